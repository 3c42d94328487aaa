// What a coordinator sends to this page: the types of /dashboard/events and of the operator's actions. PROTOCOL.md explains them.

/** Milliseconds since 1970, by the coordinator's clock. */
export type Millis = number;
/** A worker's or a request's number: given once by this coordinator, never to another one. */
export type Num = number;

/** Event `access`, the first one: what the key may do. */
export interface Access {
  /** Of this protocol; the page asks to be loaded again when it is another one. */
  protocol: 1;
  /** False when the cluster asks nobody for a key. */
  keys: boolean;
  /** The key's name; null without one. */
  key: string | null;
  infer: boolean;
  operate: boolean;
}

export interface Model {
  name: string;
  numerics: string;
  context_max: number;
  /** The numbers of the layers with routed experts, ascending. */
  layers: number[];
  /** Routed experts of each of them, and how many of them a row chooses. */
  experts: number;
  chosen: number;
  /** Workers that should hold each expert. */
  replicas: number;
}

export interface Status {
  coordinator: string;
  leader: string;
  term: number;
  registry_reachable: boolean;
  not_ready: string;
  epoch: number;
  experts_lost: number;
  experts_exposed: number;
  /** This coordinator's sequences. */
  sequences: number;
  sequences_max: number;
}

export interface Coordinator {
  id: string;
  address: string;
}

export interface Attention {
  n: Num;
  id: string;
  address: string;
  node: string;
  cordoned: boolean;
  draining: boolean;
  /** It answered the last time that it was asked. */
  answers: boolean;
  experts_reachable: boolean;
  epoch: number;
  pages_total: number;
  page_tokens: number;
  waiting_max: number;
}

export interface Expert {
  n: Num;
  id: string;
  address: string;
  node: string;
  cordoned: boolean;
  draining: boolean;
  epoch_loaded: number;
  experts: number;
  slots: number;
}

/** An attention worker's load. Nulls are numbers that the coordinator does not have. */
export type Load = [
  n: Num,
  pages_free: number,
  running: number,
  waiting: number,
  orphans: number,
  rows_per_step: number | null,
  tokens_per_s: number | null,
  preemptions: number,
  resent: number,
  hedged: number,
];

export const EDGE_STATES = ["unknown", "down", "live", "silent", "slow"] as const;
export type EdgeState = (typeof EDGE_STATES)[number];

/** Attention worker, expert worker, index in EDGE_STATES, rate code (codec.ts), answer time code. */
export type Edge = [attention: Num, expert: Num, state: number, rate: number, answer: number];

/** An edge that is not live, and what was done about it since it has not been. */
export interface Trouble {
  a: Num;
  e: Num;
  since: Millis;
  detail: string;
  /** Frames that others were asked for as well; and that were lost, and sent again. */
  hedged: number;
  resent: number;
  /** Rows times experts that were sent to other holders instead. */
  steered: number;
}

/** Sums over all workers since the coordinator started: a worker's restart does not take anything back. */
export interface Counters {
  sent: number;
  resent: number;
  hedged: number;
  unmatched: number;
  misdirected: number;
  rejected: number;
  preemptions: number;
  refusals: number;
}

/** One second: rates over the last 5 s, times in milliseconds over the last 10 s; null where nothing was measured. */
export type Point = [
  t_s: number,
  tokens_per_s: number,
  requests_per_s: number,
  ttft_p50: number | null,
  ttft_p95: number | null,
  ttft_p99: number | null,
  gap_p50: number | null,
  gap_p95: number | null,
  gap_p99: number | null,
];

/** placing: no worker has it yet. prefill: no token has come. recovering: its worker was lost, another one is looked for. */
export type RequestState = "placing" | "prefill" | "decode" | "recovering";

export interface Request {
  n: Num;
  id: string;
  /** The key's name, empty where nobody is asked for one. */
  key: string;
  worker: string;
  prompt: number;
  emitted: number;
  started: Millis;
  state: RequestState;
}

export const EVENT_KINDS = [
  "joined", "left", "died", "cordoned", "uncordoned", "drained",
  "edge_down", "edge_slow", "edge_up",
  "resent", "moved", "placed", "leader", "registry",
] as const;
export type EventKind = (typeof EVENT_KINDS)[number];

export interface ClusterEvent {
  n: number;
  t: Millis;
  kind: EventKind;
  /** The worker, edge, coordinator or request that it is about. */
  subject: string;
  text: string;
}

/** Event `snapshot`: everything but who holds what and the experts' load, which follow at once. */
export interface Snapshot {
  t: Millis;
  model: Model;
  status: Status;
  coordinators: Coordinator[];
  attention: Attention[];
  experts: Expert[];
  load: Load[];
  edges: Edge[];
  trouble: Trouble[];
  counters: Counters;
  history: Point[];
  requests: Request[];
  requests_total: number;
  events: ClusterEvent[];
}

/** Event `update`, once a second: what is not there has not changed. */
export interface Update {
  t: Millis;
  point: Point;
  counters?: Counters;
  status?: Status;
  coordinators?: Coordinator[];
  attention?: Attention[];
  experts?: Expert[];
  gone?: [role: "a" | "e", n: Num, how: "left" | "died"][];
  load?: Load[];
  edges?: Edge[];
  trouble?: Trouble[];
  requests?: Request[];
  progress?: [n: Num, emitted: number][];
  ended?: Num[];
  requests_total?: number;
  events?: ClusterEvent[];
}

/** Event `placement`: for each layer and each of its experts, how many workers hold it, and their numbers. */
export interface PlacementMessage {
  epoch: number;
  /** Base64 of LEB128 numbers. */
  holders: string;
}

/** Event `heat`: a byte for each expert, layer by layer. */
export interface HeatMessage {
  t: Millis;
  /** Base64; codec.ts says what a byte means. */
  load: string;
}

/** Event `bye`: the coordinator ends this stream. */
export interface Bye {
  reason: string;
}

export type Message =
  | { event: "access"; data: Access }
  | { event: "snapshot"; data: Snapshot }
  | { event: "update"; data: Update }
  | { event: "placement"; data: PlacementMessage }
  | { event: "heat"; data: HeatMessage }
  | { event: "bye"; data: Bye };

export interface CordonRequest {
  worker: string;
  cordoned: boolean;
  drain: boolean;
}

export interface RebalanceResponse {
  epoch: number;
  moved: number;
  imbalance_before: number;
  imbalance_after: number;
}
