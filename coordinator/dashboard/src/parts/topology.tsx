// The cluster drawn: coordinators, attention workers, expert workers by node, and the edges between them; or the same as a table.
import { useMemo, useState } from "preact/hooks";
import { byId, type AttentionWorker, type Cluster, type ExpertWorker } from "../data/cluster.ts";
import { compact, percent, us } from "../data/format.ts";
import { attentionHealth, expertHealth, plural, terms, type Health } from "../data/health.ts";
import type { Coordinator } from "../data/protocol.ts";
import { store } from "../store.ts";
import { Edges } from "./edges.tsx";
import { Bar, Choice, Panel } from "./panel.tsx";
import { roving } from "./roving.ts";
import { WorkersTable } from "./workers.tsx";

/** Past these all edges at once would be a thicket, and cards a tower: then cells, and the edges of what is pointed at or unwell. */
const EDGES_MAX = 64;
const CARDS_MAX = 12;

/** A worker that is pointed at or has the focus. */
export interface Aim {
  role: "a" | "e";
  n: number;
}

export function Topology({ cluster }: { cluster: Cluster }) {
  const [form, setForm] = useState<"graph" | "table">("graph");
  const [aim, setAim] = useState<Aim | null>(null);
  const attention = byId(cluster.attention.values());
  const experts = byId(cluster.experts.values());
  const isLarge = attention.length * experts.length > EDGES_MAX || Math.max(attention.length, experts.length) > CARDS_MAX;
  const size = isLarge ? "large" : "small";
  const { leader, term } = cluster.status;
  const note = leader ? `led by ${leader}, term ${term}` : "nobody leads";
  const tools = <Choice label="Form" value={form} options={{ graph: "Graph", table: "Table" }} onChange={setForm} />;
  return (
    <Panel title="Cluster" class="topology-panel" note={note} tools={tools}>
      {form === "table" ? <WorkersTable cluster={cluster} /> : (
        <>
          <div class={`topology ${size}`} onPointerLeave={() => setAim(null)}>
            <Edges cluster={cluster} aim={aim} all={size === "small"} />
            <Coordinators cluster={cluster} />
            <Column title="Attention workers" count={attention.length}>
              <div class="nodes" role="toolbar" aria-label="Attention workers" onKeyDown={roving}>
                {attention.map((worker, i) => <AttentionNode key={worker.n} cluster={cluster} worker={worker} first={i === 0} aim={aim} setAim={setAim} />)}
              </div>
            </Column>
            <Column title="Expert workers" count={experts.length}>
              <ExpertNodes cluster={cluster} experts={experts} aim={aim} setAim={setAim} />
            </Column>
          </div>
          <Caption cluster={cluster} aim={aim} />
        </>
      )}
    </Panel>
  );
}

function Column({ title, count, children }: { title: string; count: number; children: preact.ComponentChildren }) {
  return (
    <div class="column">
      <h3>{title} <span class="muted">{count}</span></h3>
      {children}
    </div>
  );
}

function Coordinators({ cluster }: { cluster: Cluster }) {
  const { coordinator, leader } = cluster.status;
  const role = (it: Coordinator): string => [it.id === leader ? "leads" : "", it.id === coordinator ? "this one" : ""].filter(Boolean).join(", ");
  return (
    <Column title="Coordinators" count={cluster.coordinators.length}>
      <ul class="nodes">
        {cluster.coordinators.map((it) => (
          <li key={it.id} class={`node ${it.id === leader ? "leader" : ""}`} data-node={`c:${it.id}`} title={it.address}>
            <span class="name">{it.id}</span><span class="facts">{role(it) || it.address}</span>
          </li>
        ))}
      </ul>
    </Column>
  );
}

interface NodeProps {
  first: boolean;
  aim: Aim | null;
  setAim: (aim: Aim | null) => void;
}

/** A worker as a button: opens its sheet; pointing at it shows its edges. */
function Node({ aim, own, id, health, first, facts, more, share, setAim }: NodeProps & { own: Aim; id: string; health: Health; facts: string; more: string; share: number }) {
  const isAim = aim?.role === own.role && aim.n === own.n;
  const name = [`${id} ${facts}`, health.label === facts ? [] : health.label, more].flat().join(", ");
  return (
    <button
      type="button"
      class={`node tone-${health.tone} ${isAim ? "aimed" : ""}`}
      data-node={`${own.role}:${own.n}`}
      tabIndex={first ? 0 : -1}
      aria-label={name}
      onPointerEnter={() => setAim(own)}
      onFocus={() => setAim(own)}
      onBlur={() => setAim(null)}
      onClick={() => store.show({ is: "worker", ...own })}
    >
      <span class="name"><span class="dot" />{id}</span>{" "}
      <span class="facts">{facts}</span>
      <Bar share={share} tone={own.role === "a" && share > 0.92 ? "warn" : "accent"} />
    </button>
  );
}

function AttentionNode({ cluster, worker, ...rest }: NodeProps & { cluster: Cluster; worker: AttentionWorker }) {
  const health = attentionHealth(cluster, worker);
  const [, free, running, waiting] = worker.load ?? [];
  const used = 1 - (free ?? worker.pages_total) / (worker.pages_total || 1);
  const facts = health.tone === "bad" || health.tone === "off" ? health.label : `${running ?? 0} running${waiting ? `, ${waiting} waiting` : ""}`;
  return <Node {...rest} own={{ role: "a", n: worker.n }} id={worker.id} health={health} facts={facts} more={`cache ${percent(used, 1)}`} share={used} />;
}

function ExpertNodes({ cluster, experts, aim, setAim }: { cluster: Cluster; experts: ExpertWorker[]; aim: Aim | null; setAim: (aim: Aim | null) => void }) {
  const busiest = Math.max(1, ...experts.map((worker) => terms(cluster, worker)));
  const nodes = useMemo(() => grouped(experts), [experts.map((worker) => `${worker.n}@${worker.node}`).join()]);
  return (
    <div class="racks" role="toolbar" aria-label="Expert workers" onKeyDown={roving}>
      {nodes.map(([node, numbers], i) => (
        <div key={node} class="rack" role="group" aria-label={`node ${node}`}>
          <div class="nodes">
            {numbers.map((n, j) => {
              const worker = cluster.experts.get(n);
              if (!worker) return null;
              const health = expertHealth(cluster, worker);
              const load = terms(cluster, worker);
              const facts = health.tone === "bad" || health.tone === "off" ? health.label : `${worker.experts} experts`;
              return (
                <Node
                  key={n} own={{ role: "e", n }} id={worker.id} health={health} facts={facts} more={`${compact(load)} rows a second`} share={load / busiest}
                  first={i === 0 && j === 0} aim={aim} setAim={setAim}
                />
              );
            })}
          </div>
          <span class="rack-name" aria-hidden="true">{node}</span>
        </div>
      ))}
    </div>
  );
}

function grouped(experts: ExpertWorker[]): [string, number[]][] {
  const nodes = new Map<string, number[]>();
  for (const { node, n } of experts) nodes.set(node, [...(nodes.get(node) ?? []), n]);
  return byId([...nodes].map(([id, numbers]) => ({ id, numbers }))).map(({ id, numbers }) => [id, numbers]);
}

/** One line about what is pointed at, else how to read the picture. */
function Caption({ cluster, aim }: { cluster: Cluster; aim: Aim | null }) {
  const worker = aim && (aim.role === "a" ? cluster.attention : cluster.experts).get(aim.n);
  if (!aim || !worker) {
    return (
      <ul class="caption key-of-edges" aria-label="Edges">
        {(["live", "slow", "silent", "down"] as const).map((state) => <li key={state} class={`edge-${state}`}><i />{state} <b>{[...cluster.edges.values()].filter((edge) => edge.state === state).length}</b></li>)}
      </ul>
    );
  }
  const edges = cluster.edgesOf(aim.role, aim.n);
  const times = edges.map((edge) => edge.answer_us).filter(Boolean).sort((x, y) => x - y);
  const health = aim.role === "a" ? attentionHealth(cluster, worker as AttentionWorker) : expertHealth(cluster, worker as ExpertWorker);
  const median = times.length > 0 ? `, ${us(times[times.length >> 1] ?? 0)} a frame` : "";
  const rows = edges.reduce((sum, edge) => sum + edge.terms_per_s, 0);
  const text = `node ${worker.node} · ${health.label} · ${edges.length} ${plural(edges.length, "edge")}, ${compact(rows)} rows/s${median}`;
  return <p class="caption" aria-hidden="true"><b>{worker.id}</b> {text}</p>;
}
