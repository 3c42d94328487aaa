// The page's data layer: packing, the event stream, the cluster's state, health, imbalance, words.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Cluster, GONE_MS, POINTS_MAX } from "../../src/data/cluster.ts";
import { answerUs, holders, loadRatio, numbers, rate } from "../../src/data/codec.ts";
import { age, compact, count, few, ms, percent, us } from "../../src/data/format.ts";
import { attentionHealth, clusterHealth, expertHealth } from "../../src/data/health.ts";
import { imbalance } from "../../src/data/imbalance.ts";
import { pause } from "../../src/data/link.ts";
import type { Attention, Edge, Expert, Point, Snapshot, Update } from "../../src/data/protocol.ts";
import { EventParser } from "../../src/data/sse.ts";

const base64 = (...bytes: number[]): string => Buffer.from(bytes).toString("base64");

const attention = (n: number): Attention => ({
  n, id: `a${n}`, address: "h:1", node: "n", cordoned: false, draining: false, answers: true, experts_reachable: true,
  epoch: 1, pages_total: 10, page_tokens: 64, waiting_max: 8,
});
const expert = (n: number): Expert => ({
  n, id: `e${n}`, address: "h:1", node: "n", cordoned: false, draining: false, epoch_loaded: 1, experts: 2, slots: 0,
});
const point = (t: number): Point => [t, 1, 2, null, null, null, 3, 4, 5];
const counters = (resent: number) =>
  ({ sent: 0, resent, hedged: 0, unmatched: 0, misdirected: 0, rejected: 0, preemptions: 0, refusals: 0 });

function snapshot(edges: Edge[] = []): Snapshot {
  return {
    t: 1000,
    model: { name: "m", numerics: "f32", context_max: 64, layers: [1, 2], experts: 2, chosen: 1, replicas: 1 },
    status: {
      coordinator: "c0", leader: "c0", term: 1, registry_reachable: true, not_ready: "", epoch: 1, experts_lost: 0,
      experts_exposed: 0, sequences: 0, sequences_max: 8,
    },
    coordinators: [{ id: "c0", address: "h:1" }], attention: [attention(1), attention(2)], experts: [expert(3), expert(4)],
    load: [[1, 5, 1, 0, 0, null, null, 0, 0, 0]], edges, trouble: [], counters: counters(0), history: [point(1)],
    requests: [], requests_total: 0, events: [{ n: 1, t: 1, kind: "joined", subject: "e3", text: "" }],
  };
}

function updated(cluster: Cluster, t: number, update: Partial<Update>): Cluster {
  cluster.apply({ event: "update", data: { t, point: point(t / 1000), ...update } });
  return cluster;
}

test("codes stand for what PROTOCOL.md says", () => {
  assert.deepEqual([0, 1, 112, 128, 144, 255].map(loadRatio).map((x) => +x.toFixed(4)), [0, 0.0041, 0.5, 1, 2, 245.1464]);
  assert.deepEqual([0, 4, 40].map(rate), [0, 1, 1023]);
  assert.deepEqual([0, 8, 80].map(answerUs), [0, 2, 1024]);
  assert.deepEqual([...numbers(Uint8Array.of(0, 127, 0x80, 1, 0xff, 0xff, 3))], [0, 127, 128, 65535]);
});

test("holders come whole or not at all", () => {
  assert.deepEqual(holders(base64(1, 3, 2, 3, 0x80, 1), 2), [[3], [3, 128]]);
  assert.throws(() => holders(base64(1, 3), 2), /has 1 experts; expected 2/);
  assert.throws(() => holders(base64(1, 3, 2, 3), 2), /in the middle/);
});

test("events are the same however the stream is cut", () => {
  const text = ": hello\n\nevent: update\r\ndata: {\"a\":1}\r\n\r\ndata: x\ndata: y\n\nevent: empty\n\n";
  const expected = [{ event: "update", data: '{"a":1}' }, { event: "message", data: "x\ny" }];
  for (let size = 1; size <= text.length; size++) {
    const parser = new EventParser();
    const pieces = Array.from({ length: Math.ceil(text.length / size) }, (_, i) => text.slice(i * size, (i + 1) * size));
    assert.deepEqual(pieces.flatMap((piece) => parser.push(piece)), expected, `pieces of ${size}`);
  }
});

test("an update changes what it names and nothing else", () => {
  const cluster = new Cluster(snapshot([[1, 3, 2, 4, 8], [2, 3, 2, 4, 8]]));
  updated(cluster, 2000, { attention: [{ ...attention(1), cordoned: true }], edges: [[1, 3, 4, 0, 80]] });
  assert.equal(cluster.attention.get(1)?.cordoned, true);
  assert.deepEqual(cluster.attention.get(1)?.load, [1, 5, 1, 0, 0, null, null, 0, 0, 0], "its load stays");
  assert.deepEqual(cluster.edgesOf("e", 3).map((e) => [e.a, e.state, e.answer_us]), [[1, "slow", 1024], [2, "live", 2]]);
});

test("requests come, go on and end", () => {
  const request = { n: 7, id: "r", key: "", worker: "a1", prompt: 3, emitted: 0, started: 0, state: "prefill" as const };
  const cluster = updated(new Cluster(snapshot()), 2000, { requests: [request], requests_total: 1 });
  updated(cluster, 3000, { progress: [[7, 5], [8, 1]] });
  assert.equal(cluster.requests.get(7)?.emitted, 5);
  updated(cluster, 4000, { ended: [7], requests_total: 0 });
  assert.deepEqual([cluster.requests.size, cluster.requests_total], [0, 0]);
});

test("a worker that has gone is shown for a while, without its edges", () => {
  const cluster = new Cluster(snapshot([[1, 3, 2, 0, 0], [1, 4, 2, 0, 0]]));
  updated(cluster, 2000, { gone: [["e", 3, "died"]] });
  assert.deepEqual(expertHealth(cluster, cluster.experts.get(3)!), { tone: "off", label: "died" });
  assert.deepEqual(cluster.edgesOf("a", 1).map((edge) => edge.e), [4]);
  updated(cluster, 2000 + GONE_MS, {});
  assert.ok(cluster.experts.has(3));
  updated(cluster, 2001 + GONE_MS, {});
  assert.ok(!cluster.experts.has(3));
});

test("one that comes back is there again", () => {
  const cluster = updated(new Cluster(snapshot()), 2000, { gone: [["a", 1, "left"]] });
  updated(cluster, 3000, { attention: [attention(1)] });
  assert.equal(attentionHealth(cluster, cluster.attention.get(1)!).label, "live");
});

test("the history and the events are bounded", () => {
  const cluster = new Cluster(snapshot());
  for (let i = 0; i < POINTS_MAX + 5; i++) {
    updated(cluster, 2000 + i * 1000, { events: [{ n: i + 2, t: i, kind: "joined", subject: "", text: "" }] });
  }
  assert.ok(cluster.history.every((column) => column.length === POINTS_MAX));
  assert.deepEqual([cluster.events.length, cluster.events[0]?.n], [500, POINTS_MAX + 6], "newest first");
  assert.equal(cluster.latest(8), 5);
});

test("counters rise over the last minute", () => {
  const cluster = new Cluster(snapshot());
  for (let s = 1; s <= 100; s++) updated(cluster, 1000 + s * 1000, { counters: counters(s) });
  assert.equal(cluster.rise().resent, 60);
});

test("a worker's health is the worst that its edges say", () => {
  const table: [Edge[], Partial<Expert>, string, string][] = [
    [[[1, 3, 2, 0, 0], [2, 3, 2, 0, 0]], {}, "ok", "live"],
    [[[1, 3, 1, 0, 0], [2, 3, 1, 0, 0]], {}, "bad", "unreachable"],
    [[[1, 3, 1, 0, 0], [2, 3, 2, 0, 0]], {}, "warn", "down from 1 of 2"],
    [[[1, 3, 4, 0, 0], [2, 3, 3, 0, 0]], {}, "warn", "silent from 1 of 2"],
    [[[1, 3, 2, 0, 0]], { epoch_loaded: 0 }, "note", "loading"],
    [[[1, 3, 2, 0, 0]], { cordoned: true }, "note", "cordoned"],
    [[[1, 3, 4, 0, 0]], { draining: true }, "note", "draining"],
    [[], {}, "ok", "live"],
  ];
  for (const [edges, change, tone, label] of table) {
    const cluster = new Cluster(snapshot(edges));
    assert.deepEqual(expertHealth(cluster, { ...expert(3), ...change }), { tone, label });
  }
});

test("an attention worker that does not answer has no say about others", () => {
  const cluster = new Cluster(snapshot([[1, 3, 1, 0, 0], [2, 3, 2, 0, 0]]));
  updated(cluster, 2000, { attention: [{ ...attention(1), answers: false }] });
  assert.equal(attentionHealth(cluster, cluster.attention.get(1)!).label, "does not answer");
  assert.equal(expertHealth(cluster, cluster.experts.get(3)!).label, "live");
});

test("an expert worker that nobody reaches is not held against those who do not reach it", () => {
  const a1 = (edges: Edge[]): string => {
    const cluster = new Cluster(snapshot(edges));
    return attentionHealth(cluster, cluster.attention.get(1)!).label;
  };
  assert.equal(a1([[1, 3, 1, 0, 0], [2, 3, 1, 0, 0], [1, 4, 2, 0, 0]]), "live");
  assert.equal(a1([[1, 3, 1, 0, 0], [2, 3, 2, 0, 0], [1, 4, 2, 0, 0]]), "down to 1 of 2");
  assert.equal(a1([[1, 3, 1, 0, 0], [2, 3, 2, 0, 0], [1, 4, 1, 0, 0], [2, 4, 2, 0, 0]]), "cut off");
});

test("the cluster says first why it does not serve", () => {
  const cluster = new Cluster(snapshot());
  assert.deepEqual(clusterHealth(cluster), { tone: "ok", label: "Serving", issues: [] });
  cluster.status = { ...cluster.status, experts_lost: 1, not_ready: "1 expert is lost", leader: "" };
  const health = clusterHealth(cluster);
  assert.deepEqual([health.tone, health.label], ["bad", "Not serving: 1 expert is lost"]);
  assert.deepEqual(health.issues.map((i) => i.label), ["1 expert without a live holder", "no coordinator leads"]);
});

test("imbalance is the most loaded worker over the mean, averaged over layers", () => {
  const cluster = new Cluster(snapshot());
  assert.equal(imbalance(cluster), null);
  // Two layers of two experts; e3 holds both experts of the first layer, then each holds one. Ratios 1 and 1.
  cluster.apply({ event: "placement", data: { epoch: 1, holders: base64(1, 3, 1, 3, 1, 3, 1, 4) } });
  cluster.apply({ event: "heat", data: { t: 1, load: base64(128, 128, 128, 128) } });
  assert.equal(imbalance(cluster), 1.5);
  // Half of an expert's load goes to each of its holders.
  cluster.apply({ event: "placement", data: { epoch: 2, holders: base64(2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4) } });
  assert.equal(imbalance(cluster), 1);
});

test("pauses grow and are bounded", () => {
  assert.deepEqual([0, 1, 4, 5, 50].map((n) => pause(n, 0)), [500, 1000, 8000, 10_000, 10_000]);
  assert.equal(pause(0, 1), 375);
});

test("numbers read well", () => {
  assert.deepEqual([0, 7, 1.234, 999, 999.7, 1234, 99_960, 1_234_567, null].map(compact),
    ["0", "7", "1.23", "999", "1.00 k", "1.23 k", "100 k", "1.23 M", "–"]);
  assert.equal(count(1234567), "1\u202f234\u202f567");
  assert.deepEqual([0.84, 12.34, 999.7, null].map(ms), ["0.84 ms", "12.3 ms", "1.00 s", "–"]);
  assert.deepEqual([0, 840.4, 1200].map(us), ["–", "840 µs", "1.20 ms"]);
  assert.deepEqual([-5, 4_999, 63_000, 3_723_000].map(age), ["0 s", "4 s", "1 min 3 s", "1 h 2 min"]);
  assert.deepEqual([percent(1, 3), percent(1, 0)], ["33 %", "–"]);
  assert.equal(few(["a", "b", "c"], 2), "a, b and 1 more");
});
