// Who holds an expert, and how that reads.
import type { Cluster } from "./cluster.ts";
import { loadRatio } from "./codec.ts";
import { compact, few } from "./format.ts";
import { expertHealth } from "./health.ts";

/** Holders of the i-th expert that can be reached. */
export function liveHolders(cluster: Cluster, i: number): number {
  return (cluster.holders[i] ?? []).filter((n) => {
    const worker = cluster.experts.get(n);
    return worker && !["bad", "off"].includes(expertHealth(cluster, worker).tone);
  }).length;
}

export const holderIds = (cluster: Cluster, i: number): string[] => (cluster.holders[i] ?? []).map((n) => cluster.experts.get(n)?.id ?? `worker ${n}`);

export const loadWords = (code: number | undefined): string => (code === undefined ? "–" : code === 0 ? "none" : `${compact(loadRatio(code))}×`);

/** An expert in words: how much it is asked for, and who holds it. */
export function holderWords(cluster: Cluster, i: number): string {
  const code = cluster.heat[i];
  const load = code === undefined ? "load unknown" : code === 0 ? "not asked for" : `${loadWords(code)} the layer's mean`;
  const all = holderIds(cluster, i);
  return `${load}; held by ${few(all, 6) || "nobody"}${all.length > 0 ? `, ${liveHolders(cluster, i)} of ${all.length} live` : ""}`;
}
