// Each attention worker's latent cache and batches.
import { byId, type AttentionWorker, type Cluster } from "../data/cluster.ts";
import { compact, count, percent } from "../data/format.ts";
import { attentionHealth } from "../data/health.ts";
import { store } from "../store.ts";
import { Bar, Panel, Scroll, State } from "./panel.tsx";

export function AttentionTable({ cluster }: { cluster: Cluster }) {
  const workers = byId(cluster.attention.values());
  return (
    <Panel title="Attention workers" note="latent cache and batches" class="attention-table">
      <Scroll label="Table of attention workers">
        <table>
          <thead>
            <tr>
              <th scope="col">Worker</th><th scope="col">State</th><th scope="col">Latent cache</th>
              <th scope="col" class="num">Running</th><th scope="col" class="num">Waiting</th><th scope="col" class="num">Rows a step</th>
              <th scope="col" class="num">Tokens/s</th><th scope="col" class="num">Preempted</th>
            </tr>
          </thead>
          <tbody>{workers.map((worker) => <Row key={worker.n} cluster={cluster} worker={worker} />)}</tbody>
        </table>
      </Scroll>
    </Panel>
  );
}

function Row({ cluster, worker }: { cluster: Cluster; worker: AttentionWorker }) {
  const [, free, running, waiting, , rows, tokens, preemptions] = worker.load ?? [];
  const used = worker.pages_total - (free ?? worker.pages_total);
  const cells = [running, waiting, rows, tokens, preemptions];
  return (
    <tr class={worker.gone ? "faded" : undefined}>
      <th scope="row"><button type="button" class="link" onClick={() => store.show({ is: "worker", role: "a", n: worker.n })}>{worker.id}</button></th>
      <td><State health={attentionHealth(cluster, worker)} /></td>
      <td class="cache">
        <Bar share={used / worker.pages_total} tone={used / worker.pages_total > 0.92 ? "warn" : "accent"} />
        <span class="share">{percent(used, worker.pages_total)}</span>
        <span class="muted of">{count(used)} / {count(worker.pages_total)} pages</span>
      </td>
      {cells.map((value, i) => <td key={i} class="num">{compact(value)}</td>)}
    </tr>
  );
}
