// The first view: the cluster in numbers, drawn, over time, worker by worker, and what is wrong with it.
import type { Cluster } from "../data/cluster.ts";
import { compact, ms } from "../data/format.ts";
import { AttentionTable } from "../parts/attention.tsx";
import { Chart } from "../parts/chart.tsx";
import { Feed } from "../parts/feed.tsx";
import { Panel } from "../parts/panel.tsx";
import { Tiles } from "../parts/tiles.tsx";
import { Topology } from "../parts/topology.tsx";
import { Counts, TroubleTable } from "../parts/trouble.tsx";

const percentiles = (first: number) =>
  ["p50", "p95", "p99"].map((label, i) => ({ label, column: first + i, colour: ["accent", "curve-2", "curve-3"][i] ?? "accent", format: ms }));

export function ClusterView({ cluster }: { cluster: Cluster }) {
  return (
    <>
      <Tiles cluster={cluster} />
      <div class="grid">
        <Topology cluster={cluster} />
        <Panel title="Events" class="side" tools={<a href="#events">All events</a>}>
          <Feed events={cluster.events.slice(0, 40)} />
        </Panel>
      </div>
      <div class="charts">
        <Chart title="Throughput" cluster={cluster} curves={[{ label: "tokens/s", column: 1, colour: "accent", fill: true, format: compact }]} />
        <Chart title="Time to first token" cluster={cluster} curves={percentiles(3)} />
        <Chart title="Token gap" cluster={cluster} curves={percentiles(6)} />
      </div>
      <div class="grid">
        <AttentionTable cluster={cluster} />
        <div class="side stack">
          <Counts cluster={cluster} />
          <TroubleTable cluster={cluster} />
        </div>
      </div>
    </>
  );
}
