// Edges that are not live, what was done about them, and how often the like of it has happened.
import type { Cluster } from "../data/cluster.ts";
import { edgeKey } from "../data/cluster.ts";
import { age, compact, count, us } from "../data/format.ts";
import { EDGE_TONES } from "../data/health.ts";
import type { Counters, EdgeState, Trouble } from "../data/protocol.ts";
import { Panel, State } from "./panel.tsx";

const COUNTS: [keyof Counters, string, string][] = [
  ["resent", "Resent", "frames sent again after a loss"],
  ["hedged", "Hedged", "frames sent to a second holder because the first was late"],
  ["unmatched", "Dropped", "answers that nobody waited for any more"],
  ["preemptions", "Preempted", "sequences that gave up their pages and start again"],
  ["refusals", "Refused", "requests refused because everything was full"],
];

export function Counts({ cluster }: { cluster: Cluster }) {
  const rise = cluster.rise();
  return (
    <Panel title="Counters" note="last minute, and in all">
      <dl class="counts">
        {COUNTS.map(([name, title, meaning]) => (
          <div key={name} title={meaning}>
            <dt>{title}<span class="hidden">, {meaning}</span></dt>
            <dd><b class={rise[name] > 0 ? "" : "muted"}>+{compact(rise[name])}</b> <span class="muted">{count(cluster.counters[name])}</span></dd>
          </div>
        ))}
      </dl>
    </Panel>
  );
}

export function TroubleTable({ cluster }: { cluster: Cluster }) {
  const { trouble } = cluster;
  return (
    <Panel title="Edges in trouble" note={trouble.length === 0 ? undefined : `${trouble.length}`}>
      {trouble.length === 0 ? <p class="empty">All edges are live.</p> : (
        <ul class="troubles" tabIndex={0} aria-label="Edges in trouble">
          {trouble.map((it) => <Item key={edgeKey(it.a, it.e)} cluster={cluster} it={it} />)}
        </ul>
      )}
    </Panel>
  );
}

const DOING: Record<EdgeState, string> = {
  unknown: "", live: "",
  down: "its rows go to other holders, or wait for one",
  silent: "its rows go to other holders where there are some",
  slow: "its rows go to other holders where there are some",
};

function Item({ cluster, it }: { cluster: Cluster; it: Trouble }) {
  const edge = cluster.edges.get(edgeKey(it.a, it.e));
  const state = edge?.state ?? "unknown";
  const [from, to] = [cluster.attention.get(it.a)?.id ?? "?", cluster.experts.get(it.e)?.id ?? "?"];
  const done = [["hedged", it.hedged], ["resent", it.resent], ["steered around", it.steered]] as const;
  const words = done.filter(([, n]) => n > 0).map(([what, n]) => `${compact(n)} ${what}`);
  return (
    <li>
      <p class="route"><b>{from}</b> <span aria-hidden="true">→</span><span class="hidden">to</span> <b>{to}</b> <State health={{ tone: EDGE_TONES[state], label: state }} /> <span class="muted">for {age(cluster.t - it.since)}</span></p>
      <p class="muted">{edge && edge.answer_us > 0 && state !== "down" ? `${us(edge.answer_us)} a frame; ` : ""}{it.detail && it.detail !== "connected" ? `${it.detail}; ` : ""}{DOING[state]}</p>
      {words.length > 0 && <p>{words.join(" · ")}</p>}
    </li>
  );
}
