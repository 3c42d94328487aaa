// How evenly the experts' load is spread over the workers that hold them, from what the heat map shows.
import type { Cluster } from "./cluster.ts";
import { loadRatio } from "./codec.ts";

/** The most loaded worker's load over the mean, for each layer; empty until load and holders are known. */
export function imbalances(cluster: Cluster): number[] {
  const { layers, experts } = cluster.model;
  if (cluster.heat.length === 0 || cluster.holders.length !== cluster.heat.length) return [];
  const workers = [...cluster.experts.values()].filter((worker) => !worker.gone).length;
  return layers.map((_, layer) => {
    const loads = new Map<number, number>();
    let total = 0;
    for (let i = layer * experts; i < (layer + 1) * experts; i++) {
      const holders = cluster.holders[i] ?? [];
      const load = loadRatio(cluster.heat[i] ?? 0);
      total += load;
      for (const holder of holders) loads.set(holder, (loads.get(holder) ?? 0) + load / holders.length);
    }
    return total === 0 ? 1 : (Math.max(...loads.values()) * workers) / total;
  });
}

/** What was worked out last: it is asked for with every drawing, and its inputs change every few seconds. */
let known: { inputs: unknown[]; mean: number | null } = { inputs: [], mean: null };

/** Their mean, as `moesaic rebalance` gives it; null until it is known. */
export function imbalance(cluster: Cluster): number | null {
  const inputs = [cluster.heat, cluster.holders, cluster.experts.size];
  if (inputs.some((input, i) => input !== known.inputs[i])) {
    const all = imbalances(cluster);
    known = { inputs, mean: all.length === 0 ? null : all.reduce((sum, x) => sum + x, 0) / all.length };
  }
  return known.mean;
}
