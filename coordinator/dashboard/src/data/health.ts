// What is well and what is not, as one tone and a few words: of a worker, of the cluster. Pure functions of what the stream told.
import type { AttentionWorker, Cluster, EdgeView, ExpertWorker } from "./cluster.ts";
import type { EdgeState, EventKind } from "./protocol.ts";

export type Tone = "ok" | "note" | "warn" | "bad" | "off";

export interface Health {
  tone: Tone;
  label: string;
}

export const EDGE_TONES: Record<EdgeState, Tone> = { unknown: "off", down: "bad", live: "ok", silent: "warn", slow: "warn" };

const count = (edges: EdgeView[], state: EdgeState): number => edges.filter((edge) => edge.state === state).length;

/** Edges of workers that answer: what others last said is no news. */
function told(cluster: Cluster, edges: EdgeView[]): EdgeView[] {
  return edges.filter((edge) => cluster.attention.get(edge.a)?.answers);
}

/** The worst that can be said of some edges; undefined if all are live. */
function worst(edges: EdgeView[], side: "from" | "to"): Health | undefined {
  const down = count(edges, "down");
  if (down > 0 && down === edges.length) return { tone: "bad", label: side === "from" ? "unreachable" : "cut off" };
  for (const state of ["silent", "slow", "down"] as const) {
    const some = count(edges, state);
    if (some > 0) return { tone: "warn", label: `${state} ${side} ${some} of ${edges.length}` };
  }
  return undefined;
}

/** Nobody who answers reaches it: then it is the expert worker that is unwell, and not they. */
function isUnreachable(cluster: Cluster, n: number): boolean {
  const edges = told(cluster, cluster.edgesOf("e", n));
  return edges.length > 0 && count(edges, "down") === edges.length;
}

export function expertHealth(cluster: Cluster, worker: ExpertWorker): Health {
  if (worker.gone) return { tone: "off", label: worker.gone.how };
  const bad = worst(told(cluster, cluster.edgesOf("e", worker.n)), "from");
  if (bad?.tone === "bad") return bad;
  if (worker.draining) return { tone: "note", label: "draining" };
  if (bad) return bad;
  if (worker.cordoned) return { tone: "note", label: "cordoned" };
  if (worker.epoch_loaded < cluster.status.epoch) return { tone: "note", label: "loading" };
  return { tone: "ok", label: "live" };
}

export function attentionHealth(cluster: Cluster, worker: AttentionWorker): Health {
  if (worker.gone) return { tone: "off", label: worker.gone.how };
  if (!worker.answers) return { tone: "bad", label: "does not answer" };
  if (!worker.experts_reachable) return { tone: "bad", label: "misses experts" };
  if (worker.draining) return { tone: "note", label: "draining" };
  const bad = worst(cluster.edgesOf("a", worker.n).filter((edge) => edge.state !== "down" || !isUnreachable(cluster, edge.e)), "to");
  if (bad) return bad;
  if (worker.cordoned) return { tone: "note", label: "cordoned" };
  return { tone: "ok", label: "live" };
}

/** The one line that says how the cluster does, and all that is wrong. */
export function clusterHealth(cluster: Cluster): Health & { issues: Health[] } {
  const { status } = cluster;
  const issues: Health[] = [];
  const add = (tone: Tone, label: string): void => void issues.push({ tone, label });
  if (status.experts_lost > 0) add("bad", `${status.experts_lost} ${plural(status.experts_lost, "expert")} without a live holder`);
  if (status.experts_exposed > 0) add("warn", `${status.experts_exposed} ${plural(status.experts_exposed, "expert")} with too few live holders`);
  if (!status.leader) add("warn", "no coordinator leads");
  if (!status.registry_reachable) add("warn", "the registry is away: the last view is in force");
  if (status.not_ready) return { tone: "bad", label: `Not serving: ${status.not_ready}`, issues };
  return { tone: issues.some((i) => i.tone === "bad") ? "bad" : issues.length > 0 ? "warn" : "ok", label: "Serving", issues };
}

export const plural = (n: number, noun: string): string => (n === 1 ? noun : `${noun}s`);

export const EVENT_TONES: Record<EventKind, Tone> = {
  joined: "ok", left: "note", died: "bad", cordoned: "note", uncordoned: "note", drained: "note",
  edge_down: "bad", edge_slow: "warn", edge_up: "ok",
  resent: "warn", moved: "warn", placed: "note", leader: "note", registry: "warn",
};

/** Rows times experts a second that it answers, over all its edges. */
export function terms(cluster: Cluster, worker: ExpertWorker): number {
  return cluster.edgesOf("e", worker.n).reduce((sum, edge) => sum + (edge.state === "down" ? 0 : edge.terms_per_s), 0);
}
