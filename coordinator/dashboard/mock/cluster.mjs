// A played cluster: what a coordinator would tell the page, second by second. Its faults are drawn, or called for by tests.
import { Placement } from "./placement.mjs";
import { answerCode, base64, loadCode, packed, Random, rateCode } from "./wire.mjs";

const [DOWN, LIVE, SILENT, SLOW] = [1, 2, 3, 4];

/** Bounds of PROTOCOL.md. */
const REQUESTS_SHOWN = 100;
const REQUESTS_NEW = 20;
const EDGES_NEW = 100;
const TROUBLE_SHOWN = 50;
const HISTORY = 900;
const EVENTS = 200;
/** Seconds: leases, until experts are placed anew, until a worker is back. */
const [LEASE_S, REPLACE_S, RETURN_S, SLOW_S] = [4, 10, 22, 30];

export const SIZES = {
  small: { model: "tiny-r1", coordinators: 1, attention: 3, experts: 4, perNode: 2, layers: [1, 2, 3, 4], routed: 32, chosen: 4, pages: 512, rate: 1.4, tokensPerS: 42 },
  large: { model: "deepseek-r1", coordinators: 3, attention: 16, experts: 128, perNode: 8, layers: Array.from({ length: 58 }, (_, i) => i + 3), routed: 256, chosen: 8, pages: 24_000, rate: 14, tokensPerS: 31 },
};

export class MockCluster {
  constructor(size, { calm = false, seed = 7, t = Date.now() } = {}) {
    this.size = SIZES[size];
    this.calm = calm;
    this.random = new Random(seed);
    this.t = t - HISTORY * 1000;
    this.numbers = 0;
    this.history = [];
    this.events = [];
    this.eventNumber = 0;
    this.news = {};
    this.requests = new Map();
    this.shown = new Set();
    this.requestNumber = 0;
    this.edges = new Map();
    this.later = [];
    this.counters = { sent: 0, resent: 0, hedged: 0, unmatched: 0, misdirected: 0, rejected: 0, preemptions: 0, refusals: 0 };
    this.strain = 0;
    this.build();
    while (this.t < t) this.tick();
  }

  build() {
    const { coordinators, attention, experts, perNode, layers, routed, pages } = this.size;
    this.coordinators = Array.from({ length: coordinators }, (_, i) => ({ id: `c${i}`, address: `10.0.0.${10 + i}:8080` }));
    this.attention = Array.from({ length: attention }, (_, i) => ({
      n: this.numbers++, id: `a${i}`, address: `10.0.1.${10 + i}:7000`, node: `n${Math.floor(i / 2)}`, cordoned: false, draining: false, answers: true,
      experts_reachable: true, epoch: 1, pages_total: pages, page_tokens: 64, waiting_max: 256, preempted: 0, resent: 0, hedged: 0, up: true,
    }));
    this.experts = Array.from({ length: experts }, (_, i) => {
      const node = Math.floor(i / perNode);
      return { n: this.numbers++, id: `e${i}`, address: `10.0.2.${10 + i}:7100`, node: `n${node}`, cordoned: false, draining: false, slots: 0, up: true, epoch_loaded: 1 };
    });
    this.loads = Array.from({ length: layers.length * routed }, () => this.random.around(0.8));
    this.normalise();
    // The first placement knows no load yet.
    this.placement = new Placement(layers.length, routed, 2);
    this.placement.place(this.experts, this.loads.map(() => 1));
    for (const a of this.attention) for (const e of this.experts) this.edges.set(`${a.n} ${e.n}`, { a, e, state: LIVE, pace: this.random.around(0.12), sent: null, waited: 0 });
    this.status = { coordinator: "c0", leader: "c0", term: 4, registry_reachable: true, not_ready: "" };
    this.changedMembers();
  }

  normalise() {
    const { routed } = this.size;
    for (let from = 0; from < this.loads.length; from += routed) {
      const mean = this.loads.slice(from, from + routed).reduce((a, b) => a + b) / routed;
      for (let i = from; i < from + routed; i++) this.loads[i] /= mean;
    }
  }

  /** One second goes by; returns the update. */
  tick() {
    this.t += 1000;
    const due = this.later.filter((it) => it.t <= this.t);
    this.later = this.later.filter((it) => it.t > this.t);
    for (const it of due) it.act();
    if (!this.calm) this.misfortune();
    this.arrive();
    this.emit();
    this.flow();
    this.measure();
    if (Math.round(this.t / 1000) % 5 === 0) this.drift();
    return this.update();
  }

  after(seconds, act) {
    this.later.push({ t: this.t + seconds * 1000, act });
  }

  tell(kind, subject, text) {
    const event = { n: ++this.eventNumber, t: this.t, kind, subject, text };
    this.events = [...this.events, event].slice(-EVENTS);
    (this.news.events ??= []).push(event);
  }

  // Faults.

  misfortune() {
    const chance = (everyS) => this.random.next() < 1 / everyS;
    if (chance(110)) this.kill(this.random.pick(this.experts.filter((e) => e.up)).id);
    if (chance(240)) this.kill(this.random.pick(this.attention.filter((a) => a.up)).id);
    if (chance(45)) this.slow(this.random.pick(this.attention.filter((a) => a.up)).id, this.random.pick(this.experts.filter((e) => e.up)).id);
    if (chance(280)) this.rebalance(false);
  }

  find(id) {
    return this.attention.find((a) => a.id === id) ?? this.experts.find((e) => e.id === id);
  }

  kill(id) {
    const worker = this.find(id);
    if (!worker?.up || [...this.attention, ...this.experts].filter((w) => !w.up).length > 2) return;
    worker.up = false;
    this.strain = 1;
    if (this.attention.includes(worker)) this.killAttention(worker);
    else this.killExpert(worker);
    this.changedMembers();
  }

  killExpert(worker) {
    for (const edge of this.edgesOf(worker)) this.turn(edge, DOWN, "the connection was closed");
    this.tell("edge_down", `* → ${worker.id}`, `all ${this.attention.length} attention workers lost it: the connection was closed`);
    for (const a of this.attention) this.count(a, "resent", Math.round(this.random.between(2, 9)));
    this.after(LEASE_S, () => {
      this.tell("died", worker.id, "its lease ran out");
      (this.news.gone ??= []).push(["e", worker.n, "died"]);
      for (const edge of this.edgesOf(worker)) edge.since = undefined;
      worker.gone = true;
    });
    this.after(REPLACE_S, () => this.replace(new Set([worker.n]), "a worker is gone"));
    this.after(RETURN_S, () => this.comeBack(worker));
  }

  killAttention(worker) {
    worker.answers = false;
    const lost = [...this.requests.values()].filter((it) => it.worker === worker.id);
    for (const it of lost) this.move(it);
    if (lost.length > 0) this.tell("moved", worker.id, `${lost.length} sequences go on elsewhere, from prompt and emitted tokens`);
    this.after(LEASE_S, () => {
      this.tell("died", worker.id, "its lease ran out");
      (this.news.gone ??= []).push(["a", worker.n, "died"]);
      worker.gone = true;
    });
    this.after(RETURN_S, () => this.comeBack(worker));
  }

  comeBack(worker) {
    Object.assign(worker, { up: true, gone: false, preempted: 0, resent: 0, hedged: 0 });
    if ("answers" in worker) worker.answers = true;
    else worker.epoch_loaded = this.placement.epoch;
    for (const edge of this.edgesOf(worker)) if (edge.a.up && edge.e.up) Object.assign(edge, { state: LIVE, since: undefined, sent: null });
    this.tell("joined", worker.id, `on node ${worker.node}`);
    this.changedMembers();
    if (!("answers" in worker)) this.after(2, () => this.rebalance(false, "a worker has joined"));
  }

  slow(from, to, state = SLOW) {
    const edge = this.edges.get(`${this.find(from).n} ${this.find(to).n}`);
    if (edge.state !== LIVE) return;
    this.turn(edge, state, state === SLOW ? "answers much later than others" : "no ping for 400 ms");
    this.tell("edge_slow", `${from} → ${to}`, state === SLOW ? "a frame takes 9 ms; its rows go elsewhere" : "answers no pings; its rows go elsewhere");
    this.after(SLOW_S, () => {
      if (edge.state !== state) return;
      this.turn(edge, LIVE, "connected");
      this.tell("edge_up", `${from} → ${to}`, "answers in time again");
    });
  }

  turn(edge, state, detail) {
    Object.assign(edge, { state, detail, since: state === LIVE ? undefined : this.t, hedged: 0, resent: state === DOWN ? Math.round(this.random.between(1, 8)) : 0, steered: 0 });
  }

  // Placement.

  serving() {
    return this.experts.filter((e) => e.up && !e.gone && !e.cordoned && !e.draining);
  }

  replace(gone, why) {
    const moved = this.placement.without(gone, this.serving(), this.loads);
    if (moved > 0) this.placed(moved, why);
  }

  rebalance(dryRun, why = "asked for") {
    const before = this.placement.imbalance(this.serving(), this.loads);
    const plan = this.placement.copy();
    const moved = plan.place(this.serving(), this.loads);
    const after = plan.imbalance(this.serving(), this.loads);
    const isWorth = before - after > 0.005;
    if (!dryRun && isWorth) {
      this.placement = plan;
      this.placed(moved, `${why}: imbalance ${before.toFixed(2)} → ${after.toFixed(2)}`);
    }
    return { epoch: isWorth ? plan.epoch : this.placement.epoch, moved: isWorth ? moved : 0, imbalance_before: before, imbalance_after: isWorth ? after : before };
  }

  placed(moved, why) {
    this.isPlaced = true;
    this.tell("placed", `epoch ${this.placement.epoch}`, `${moved} experts to load; ${why}`);
    const { epoch } = this.placement;
    this.after(3, () => {
      for (const worker of this.experts) if (worker.up) worker.epoch_loaded = Math.max(worker.epoch_loaded, epoch);
      for (const worker of this.attention) if (worker.up) worker.epoch = Math.max(worker.epoch, epoch);
      this.changedMembers();
    });
    this.changedMembers();
  }

  cordon({ worker: id, cordoned, drain }) {
    const worker = this.find(id);
    if (!worker) return false;
    worker.cordoned = cordoned;
    worker.draining = cordoned && drain;
    this.tell(cordoned ? (drain ? "drained" : "cordoned") : "uncordoned", id, cordoned ? (drain ? "what it has is moved away" : "it gets nothing new") : "it takes work again");
    this.changedMembers();
    if (worker.draining && this.experts.includes(worker)) this.after(2, () => this.replace(new Set([worker.n]), `${id} is drained`));
    return true;
  }

  changedMembers() {
    this.isChanged = true;
  }

  edgesOf(worker) {
    return [...this.edges.values()].filter((edge) => edge.a === worker || edge.e === worker);
  }

  // Requests.

  arrive() {
    const wave = 1 + 0.35 * Math.sin(this.t / 97_000) + 0.15 * Math.sin(this.t / 23_000);
    this.arrived = this.random.count(this.size.rate * wave);
    for (let i = 0; i < this.arrived; i++) {
      const n = ++this.requestNumber;
      const id = `chatcmpl-${[0, 1].map(() => Math.floor(this.random.next() * 2 ** 24).toString(16).padStart(6, "0")).join("")}`;
      const length = Math.round(60 + 400 * this.random.next() ** 2);
      this.requests.set(n, { n, id, key: this.random.pick(["search", "support-bot", "ada", "nightly-eval"]), worker: "", prompt: Math.round(24 * this.random.around(1.1)) + 8, emitted: 0, started: this.t, state: "placing", length, changed: true });
    }
  }

  move(it) {
    Object.assign(it, { worker: "", state: "recovering", changed: true });
    this.counters.resent += 1;
  }

  emit() {
    this.emitted = 0;
    const running = new Map(this.attention.map((a) => [a.id, 0]));
    for (const it of this.requests.values()) if (it.worker) running.set(it.worker, running.get(it.worker) + 1);
    const open = this.attention.filter((a) => a.up && !a.cordoned);
    for (const it of this.requests.values()) {
      if (it.state === "prefill") Object.assign(it, { state: "decode", changed: true });
      if (it.state === "decode") {
        const tokens = Math.min(it.length - it.emitted, Math.max(1, Math.round(this.size.tokensPerS * this.random.around(0.1))));
        it.emitted += tokens;
        this.emitted += tokens;
        if (it.emitted >= it.length) this.end(it);
      } else if (!it.worker && open.length > 0) {
        const least = open.reduce((a, b) => (running.get(b.id) < running.get(a.id) ? b : a));
        running.set(least.id, running.get(least.id) + 1);
        Object.assign(it, { worker: least.id, state: "prefill", changed: true });
      }
    }
  }

  end(it) {
    this.requests.delete(it.n);
    if (this.shown.delete(it.n)) (this.news.ended ??= []).push(it.n);
  }

  // Rows.

  flow() {
    const shares = this.placement.shares(this.loads);
    const running = new Map();
    for (const it of this.requests.values()) if (it.worker) running.set(it.worker, [...(running.get(it.worker) ?? []), it]);
    const factor = this.size.layers.length * this.size.chosen;
    for (const a of this.attention) {
      a.sequences = a.up ? running.get(a.id) ?? [] : [];
      a.tokens = a.sequences.filter((it) => it.state === "decode").length * this.size.tokensPerS;
      const used = a.sequences.reduce((sum, it) => sum + Math.ceil((it.prompt + it.emitted) / a.page_tokens), 0);
      a.used = Math.min(a.pages_total, used + Math.round(a.pages_total * (0.34 + 0.05 * a.n % 0.3 + 0.06 * Math.sin(this.t / 61_000 + a.n))));
      a.waiting = a.used > 0.9 * a.pages_total ? 2 : 0;
      if (a.up && this.random.next() < 0.004) a.preempted += 1, this.counters.preemptions += 1;
      this.counters.sent += Math.round(a.tokens * this.size.layers.length * 0.1);
    }
    for (const edge of this.edges.values()) {
      const isOff = !edge.a.up || !edge.e.up;
      const less = edge.state === LIVE ? 1 : edge.state === DOWN ? 0 : 0.12;
      edge.terms = isOff ? 0 : edge.a.tokens * factor * (shares.get(edge.e.n) ?? 0) * less * this.random.around(0.04);
      edge.us = isOff ? 0 : 640 * edge.pace * this.random.around(0.05) * (edge.state === SLOW || edge.state === SILENT ? 14 : 1);
      if (edge.state === SLOW && edge.a.up) {
        const hedged = this.random.count(1.2);
        edge.hedged += hedged;
        this.count(edge.a, "hedged", hedged);
        edge.steered += Math.round(edge.terms * 7);
        this.counters.unmatched += this.random.count(hedged * 0.7);
      }
    }
  }

  count(worker, name, n) {
    worker[name] += n;
    this.counters[name] += n;
  }

  measure() {
    this.strain *= 0.8;
    if (this.random.next() < 0.002) this.counters.refusals += 1;
    const busy = 1 + 2.2 * this.strain + this.requests.size / (60 * this.attention.length);
    const gap = (1000 / this.size.tokensPerS) * 0.86 * this.random.around(0.03);
    const first = 58 * busy * this.random.around(0.06);
    const round = (x) => Math.round(x * 10) / 10;
    const now = [first, first * 1.9 * this.random.around(0.08), first * 2.9 * this.random.around(0.12), gap, gap * (1.25 + this.strain), gap * (1.6 + 6 * this.strain) * this.random.around(0.08)];
    this.times = now.map((time, i) => time * 0.15 + (this.times?.[i] ?? time) * 0.85);
    this.seconds = [...(this.seconds ?? []), [this.emitted, this.arrived]].slice(-5);
    const mean = (i) => this.seconds.reduce((sum, second) => sum + second[i], 0) / this.seconds.length;
    this.point = [Math.round(this.t / 1000), round(mean(0)), round(mean(1)), ...this.times.map(round)];
    this.history = [...this.history, this.point].slice(-HISTORY);
  }

  /** What people ask about changes. */
  drift() {
    for (let i = 0; i < this.loads.length; i++) this.loads[i] *= this.random.around(0.02);
    this.normalise();
  }

  // What is told.

  statusNow() {
    const up = new Set(this.experts.filter((e) => e.up).map((e) => e.n));
    const alive = this.placement.held.map((holders) => holders.filter((n) => up.has(n)).length);
    return {
      ...this.status, epoch: this.placement.epoch, experts_lost: alive.filter((n) => n === 0).length,
      experts_exposed: alive.filter((n) => n < this.placement.replicas).length, sequences: this.requests.size, sequences_max: 1024,
    };
  }

  attentionFacts(a) {
    const { n, id, address, node, cordoned, draining, answers, experts_reachable, epoch, pages_total, page_tokens, waiting_max } = a;
    return { n, id, address, node, cordoned, draining, answers, experts_reachable, epoch, pages_total, page_tokens, waiting_max };
  }

  expertFacts(e, counts) {
    const { n, id, address, node, cordoned, draining, epoch_loaded, slots } = e;
    return { n, id, address, node, cordoned, draining, epoch_loaded, experts: counts.get(n) ?? 0, slots };
  }

  load(a) {
    return [a.n, a.pages_total - a.used, a.sequences.length, a.waiting, 0, a.sequences.length + Math.round(this.arrived * 4), a.tokens, a.preempted, a.resent, a.hedged];
  }

  request({ n, id, key, worker, prompt, emitted, started, state }) {
    return { n, id, key, worker, prompt, emitted, started, state };
  }

  edge(edge) {
    return [edge.a.n, edge.e.n, edge.state, rateCode(edge.terms), answerCode(edge.us)];
  }

  troubles() {
    const bad = [...this.edges.values()].filter((edge) => edge.state !== LIVE && edge.since !== undefined && edge.a.up && !edge.e.gone);
    return bad.slice(0, TROUBLE_SHOWN).map(({ a, e, since, detail, hedged, resent, steered }) => ({ a: a.n, e: e.n, since, detail, hedged, resent, steered }));
  }

  /** Edges whose state has changed, all of them; then those whose numbers have changed notably, the longest unsaid first. */
  changedEdges() {
    const told = [];
    const rest = [];
    for (const edge of this.edges.values()) {
      if (edge.a.gone || edge.e.gone) continue;
      const now = this.edge(edge);
      const [, , state, rate, answer] = edge.sent ?? [0, 0, -1, 0, 0];
      edge.waited += 1;
      if (state !== now[2]) told.push([edge, now]);
      else if (Math.abs(rate - now[3]) >= 2 || Math.abs(answer - now[4]) >= 4) rest.push([edge, now]);
    }
    rest.sort(([a], [b]) => b.waited - a.waited);
    const all = [...told, ...rest.slice(0, EDGES_NEW)];
    for (const [edge, now] of all) Object.assign(edge, { sent: now, waited: 0 });
    return all.map(([, now]) => now);
  }

  update() {
    const update = { t: this.t, point: this.point, counters: { ...this.counters }, ...this.news };
    this.news = {};
    const put = (name, list) => list.length > 0 && (update[name] = list);
    const counts = this.placement.counts();
    if (this.isChanged) {
      put("attention", this.changed(this.attention.filter((a) => !a.gone), (a) => this.attentionFacts(a)));
      put("experts", this.changed(this.experts.filter((e) => !e.gone), (e) => this.expertFacts(e, counts)));
      this.isChanged = false;
    }
    const status = JSON.stringify(this.statusNow());
    if (status !== this.toldStatus) update.status = JSON.parse(status);
    this.toldStatus = status;
    put("load", this.attention.filter((a) => a.up && !a.gone).map((a) => this.load(a)).filter((load) => this.isNews(`load ${load[0]}`, load)));
    put("edges", this.changedEdges());
    const trouble = this.troubles();
    if (this.isNews("trouble", trouble.map(({ a, e }) => [a, e])) || (trouble.length > 0 && Math.round(this.t / 1000) % 5 === 0)) update.trouble = trouble;
    this.tellRequests(update);
    return update;
  }

  tellRequests(update) {
    const fresh = [];
    const progress = [];
    for (const it of this.requests.values()) {
      const isNew = !this.shown.has(it.n);
      if (isNew && (this.shown.size >= REQUESTS_SHOWN || fresh.length >= REQUESTS_NEW)) continue;
      this.shown.add(it.n);
      if (it.changed || isNew) fresh.push(this.request(it));
      else if (it.state === "decode") progress.push([it.n, it.emitted]);
      it.changed = false;
    }
    if (fresh.length > 0) update.requests = fresh;
    if (progress.length > 0) update.progress = progress;
    if (this.isNews("total", this.requests.size)) update.requests_total = this.requests.size;
  }

  changed(workers, facts) {
    return workers.map(facts).filter((it) => this.isNews(`facts ${it.n}`, it));
  }

  /** True if this is not what was told last under that name. */
  isNews(name, value) {
    this.told ??= new Map();
    const text = JSON.stringify(value);
    if (this.told.get(name) === text) return false;
    this.told.set(name, text);
    return true;
  }

  snapshot() {
    const { size } = this;
    const counts = this.placement.counts();
    const [attention, experts] = [this.attention.filter((a) => !a.gone), this.experts.filter((e) => !e.gone)];
    return {
      t: this.t,
      model: { name: size.model, numerics: "bf16-dp", context_max: 4096, layers: size.layers, experts: size.routed, chosen: size.chosen, replicas: 2 },
      status: this.statusNow(), coordinators: this.coordinators, attention: attention.map((a) => this.attentionFacts(a)),
      experts: experts.map((e) => this.expertFacts(e, counts)), load: attention.filter((a) => a.up).map((a) => this.load(a)),
      edges: [...this.edges.values()].filter((edge) => !edge.a.gone && !edge.e.gone).map((edge) => edge.sent ?? this.edge(edge)),
      trouble: this.troubles(), counters: this.counters, history: this.history,
      requests: [...this.requests.values()].filter((it) => this.shown.has(it.n)).map((it) => this.request(it)), requests_total: this.requests.size, events: this.events,
    };
  }

  placementMessage() {
    return { epoch: this.placement.epoch, holders: base64(packed(this.placement.held.flatMap((holders) => [holders.length, ...holders]))) };
  }

  heatMessage() {
    return { t: this.t, load: base64(this.loads.map(loadCode)) };
  }

  /** True once after each new placement. */
  takePlaced() {
    const was = this.isPlaced === true;
    this.isPlaced = false;
    return was;
  }
}
