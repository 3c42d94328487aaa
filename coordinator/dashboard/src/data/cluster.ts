// The cluster as the stream has told it: a snapshot, kept up to date by the messages after it. No I/O, no clock: time is the coordinator's.
import { answerUs, bytes, holders, rate } from "./codec.ts";
import {
  EDGE_STATES, type Attention, type ClusterEvent, type Coordinator, type Counters, type EdgeState, type Expert, type Load,
  type Message, type Millis, type Model, type Num, type Point, type Request, type Snapshot, type Status, type Trouble, type Update,
} from "./protocol.ts";

/** A worker that has gone is shown for this long. */
export const GONE_MS = 60_000;
/** 15 minutes of points, one a second. */
export const POINTS_MAX = 900;
const EVENTS_MAX = 500;
/** Counters are kept for as long as their rise is shown. */
export const COUNTERS_MS = 60_000;

export interface Gone {
  how: "left" | "died";
  t: Millis;
}
export type AttentionWorker = Attention & { gone?: Gone; load?: Load };
export type ExpertWorker = Expert & { gone?: Gone };

export interface EdgeView {
  a: Num;
  e: Num;
  state: EdgeState;
  /** Rows times experts a second, and how long a frame takes; both rounded. */
  terms_per_s: number;
  answer_us: number;
}

const NATURAL = new Intl.Collator("en", { numeric: true });

/** Workers or nodes in the order that people expect: e2 before e10. */
export const byId = <T extends { id: string }>(workers: Iterable<T>): T[] => [...workers].sort((x, y) => NATURAL.compare(x.id, y.id));

/** A map's key for an edge. Numbers stay below 2^21, so that it is exact. */
export const edgeKey = (a: Num, e: Num): number => a * 2 ** 21 + e;

export class Cluster {
  t: Millis;
  readonly model: Model;
  status: Status;
  coordinators: Coordinator[];
  readonly attention = new Map<Num, AttentionWorker>();
  readonly experts = new Map<Num, ExpertWorker>();
  readonly edges = new Map<number, EdgeView>();
  trouble: Trouble[];
  counters: Counters;
  readonly requests = new Map<Num, Request>();
  requests_total: number;
  /** Newest first. */
  events: ClusterEvent[];
  /** A column for each number of a Point. */
  readonly history: (number | null)[][] = Array.from({ length: 9 }, () => []);
  epoch_held = 0;
  /** Who holds each expert, layer by layer; empty until it is known. */
  holders: Num[][] = [];
  /** A byte for each expert; empty until it is known. */
  heat: Uint8Array = new Uint8Array(0);
  /** The edges of each worker; made again when an edge has changed. */
  private index: Record<"a" | "e", Map<Num, EdgeView[]>> | null = null;
  private readonly earlier: { t: Millis; counters: Counters }[] = [];

  constructor(snapshot: Snapshot) {
    this.t = snapshot.t;
    this.model = snapshot.model;
    this.status = snapshot.status;
    this.coordinators = snapshot.coordinators;
    this.trouble = snapshot.trouble;
    this.counters = snapshot.counters;
    this.requests_total = snapshot.requests_total;
    this.events = [];
    for (const point of snapshot.history) this.point(point);
    this.merge(snapshot);
    this.count(snapshot.counters);
  }

  /** Takes in one message after the snapshot. */
  apply(message: Message): void {
    if (message.event === "update") this.update(message.data);
    if (message.event === "placement") {
      this.holders = holders(message.data.holders, this.model.layers.length * this.model.experts);
      this.epoch_held = message.data.epoch;
    }
    if (message.event === "heat") this.heat = bytes(message.data.load);
  }

  /** How much each counter has risen in the last minute, or since the page is there. */
  rise(): Counters {
    const first = this.earlier[0]?.counters ?? this.counters;
    const names = Object.keys(this.counters) as (keyof Counters)[];
    return Object.fromEntries(names.map((name) => [name, this.counters[name] - first[name]])) as unknown as Counters;
  }

  /** The newest value of a column of the history. */
  latest(column: number): number | null {
    return this.history[column]?.at(-1) ?? null;
  }

  edgesOf(role: "a" | "e", n: Num): EdgeView[] {
    this.index ??= { a: grouped(this.edges.values(), "a"), e: grouped(this.edges.values(), "e") };
    return this.index[role].get(n) ?? [];
  }

  private update(update: Update): void {
    this.t = update.t;
    this.point(update.point);
    if (update.status) this.status = update.status;
    if (update.coordinators) this.coordinators = update.coordinators;
    if (update.trouble) this.trouble = update.trouble;
    if (update.requests_total !== undefined) this.requests_total = update.requests_total;
    for (const [role, n, how] of update.gone ?? []) this.leave(role, n, how);
    this.merge(update);
    for (const [n, emitted] of update.progress ?? []) {
      const request = this.requests.get(n);
      if (request) request.emitted = emitted;
    }
    for (const n of update.ended ?? []) this.requests.delete(n);
    this.count(update.counters ?? this.counters);
    this.forget();
  }

  private merge(news: Partial<Snapshot>): void {
    for (const worker of news.attention ?? []) {
      const load = this.attention.get(worker.n)?.load;
      this.attention.set(worker.n, load ? { ...worker, load } : worker);
    }
    for (const worker of news.experts ?? []) this.experts.set(worker.n, worker);
    for (const load of news.load ?? []) {
      const worker = this.attention.get(load[0]);
      if (worker) worker.load = load;
    }
    for (const [a, e, state, rateCode, answerCode] of news.edges ?? []) {
      this.edges.set(edgeKey(a, e), {
        a, e, state: EDGE_STATES[state] ?? "unknown", terms_per_s: rate(rateCode), answer_us: answerUs(answerCode),
      });
    }
    if (news.edges) this.index = null;
    for (const request of news.requests ?? []) this.requests.set(request.n, request);
    if (news.events) this.events = [...news.events.toReversed(), ...this.events].slice(0, EVENTS_MAX);
  }

  private leave(role: "a" | "e", n: Num, how: "left" | "died"): void {
    const worker = (role === "a" ? this.attention : this.experts).get(n);
    if (worker) worker.gone = { how, t: this.t };
    for (const [key, edge] of this.edges) if (edge[role] === n) this.edges.delete(key);
    this.index = null;
  }

  private forget(): void {
    for (const workers of [this.attention, this.experts]) {
      for (const [n, { gone }] of workers) if (gone && this.t - gone.t > GONE_MS) workers.delete(n);
    }
  }

  private count(counters: Counters): void {
    this.counters = counters;
    this.earlier.push({ t: this.t, counters });
    while (this.earlier[1] && this.t - this.earlier[1].t >= COUNTERS_MS) this.earlier.shift();
  }

  private point(point: Point): void {
    this.history.forEach((column, i) => {
      column.push(point[i] ?? null);
      if (column.length > POINTS_MAX) column.shift();
    });
  }
}

function grouped(edges: Iterable<EdgeView>, by: "a" | "e"): Map<Num, EdgeView[]> {
  const groups = new Map<Num, EdgeView[]>();
  for (const edge of edges) {
    const group = groups.get(edge[by]);
    if (group) group.push(edge);
    else groups.set(edge[by], [edge]);
  }
  return groups;
}
