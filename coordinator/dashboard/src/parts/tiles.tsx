// The cluster in a row of numbers.
import type { Cluster } from "../data/cluster.ts";
import { compact, count, ms, percent } from "../data/format.ts";
import { plural } from "../data/health.ts";
import { imbalance } from "../data/imbalance.ts";

export function Tiles({ cluster }: { cluster: Cluster }) {
  const { status, model } = cluster;
  const loads = [...cluster.attention.values()].filter((worker) => !worker.gone && worker.load);
  const pages = loads.reduce((sum, worker) => sum + worker.pages_total, 0);
  const used = pages - loads.reduce((sum, worker) => sum + (worker.load?.[1] ?? 0), 0);
  const waiting = loads.reduce((sum, worker) => sum + (worker.load?.[3] ?? 0), 0);
  const even = imbalance(cluster);
  return (
    <dl class="tiles">
      <Tile name="Tokens" value={compact(cluster.latest(1))} unit="/s" under={`${compact(cluster.latest(2))} requests/s`} />
      <Tile name="First token" value={ms(cluster.latest(3))} under={`p95 ${ms(cluster.latest(4))}`} />
      <Tile name="Gap" value={ms(cluster.latest(6))} under={`p95 ${ms(cluster.latest(7))}`} />
      <Tile name="In flight" value={count(status.sequences)} under={`of ${count(status.sequences_max)}; ${count(waiting)} waiting`} />
      <Tile name="Latent cache" value={percent(used, pages)} under={`${compact(used)} of ${compact(pages)} pages`} />
      <Tile name="Experts" value={count(model.layers.length * model.experts)} under={`${model.layers.length} × ${model.experts}, ${model.replicas} ${plural(model.replicas, "holder")} each`} />
      <Tile name="Imbalance" value={even === null ? "–" : even.toFixed(2)} under={`placement epoch ${status.epoch}`} />
    </dl>
  );
}

function Tile({ name, value, unit, under }: { name: string; value: string; unit?: string; under: string }) {
  const [number, own] = value.split(" ");
  return (
    <div class="tile">
      <dt>{name}</dt>
      <dd><span class="figure">{number}</span><span class="unit">{own ? ` ${own}` : ""}{unit ?? ""}</span><span class="under">{under}</span></dd>
    </div>
  );
}
