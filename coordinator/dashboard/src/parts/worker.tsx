// A worker's sheet: what it is, its edges, and what an operator can do with it. Every action asks first.
import { useState } from "preact/hooks";
import { cordon } from "../data/actions.ts";
import type { AttentionWorker, Cluster, ExpertWorker } from "../data/cluster.ts";
import { compact, count, us } from "../data/format.ts";
import { attentionHealth, EDGE_TONES, expertHealth, plural } from "../data/health.ts";
import type { CordonRequest } from "../data/protocol.ts";
import { store } from "../store.ts";
import { Modal, offBecause } from "./modal.tsx";
import { Scroll, State } from "./panel.tsx";

type Action = "drain" | "cordon" | "uncordon";

const REQUESTS: Record<Action, Omit<CordonRequest, "worker">> = {
  drain: { cordoned: true, drain: true },
  cordon: { cordoned: true, drain: false },
  uncordon: { cordoned: false, drain: false },
};
const NAMES: Record<Action, string> = { drain: "Drain", cordon: "Cordon", uncordon: "Uncordon" };

export function WorkerDialog({ cluster, role, n }: { cluster: Cluster; role: "a" | "e"; n: number }) {
  const [action, setAction] = useState<Action | null>(null);
  const worker = (role === "a" ? cluster.attention : cluster.experts).get(n);
  if (!worker) return <Modal title="Gone"><p>This worker is not there any more.</p></Modal>;
  const health = role === "a" ? attentionHealth(cluster, worker as AttentionWorker) : expertHealth(cluster, worker as ExpertWorker);
  const kind = role === "a" ? "attention worker" : "expert worker";
  if (action) return <Confirm action={action} worker={worker.id} text={consequence(action, role, worker)} back={() => setAction(null)} />;
  return (
    <Modal title={worker.id}>
      <p class="lead"><State health={health} /> <span class="muted">{kind} on node {worker.node}, {worker.address}</span></p>
      <Facts facts={role === "a" ? attentionFacts(worker as AttentionWorker) : expertFacts(worker as ExpertWorker)} />
      <EdgeTable cluster={cluster} role={role} n={n} />
      {!worker.gone && <Actions cordoned={worker.cordoned} choose={setAction} />}
    </Modal>
  );
}

function Actions({ cordoned, choose }: { cordoned: boolean; choose: (action: Action) => void }) {
  const off = offBecause();
  const actions: Action[] = cordoned ? ["drain", "uncordon"] : ["cordon", "drain"];
  return (
    <>
      {off && <p class="muted" id="why-off">{off}</p>}
      <div class="buttons">
        {actions.map((action) => (
          <button key={action} type="button" aria-disabled={off ? "true" : undefined} aria-describedby={off ? "why-off" : undefined} onClick={() => off ?? choose(action)}>
            {NAMES[action]}…
          </button>
        ))}
      </div>
    </>
  );
}

function Confirm({ action, worker, text, back }: { action: Action; worker: string; text: string; back: () => void }) {
  const [error, setError] = useState("");
  const [busy, setBusy] = useState(false);
  const go = async (): Promise<void> => {
    setBusy(true);
    try {
      await cordon({ worker, ...REQUESTS[action] });
      store.show(null);
      store.say({ drain: `${worker} is being drained.`, cordon: `${worker} is cordoned.`, uncordon: `${worker} takes work again.` }[action]);
    } catch (problem) {
      setError((problem as Error).message);
      setBusy(false);
    }
  };
  return (
    <Modal title={`${NAMES[action]} ${worker}?`}>
      <p>{text}</p>
      {error && <p class="tone-bad" role="alert"><span class="dot" /> Not done: {error}</p>}
      <div class="buttons">
        <button type="button" onClick={back}>Cancel</button>
        <button type="button" class="primary" disabled={busy} onClick={go}>{NAMES[action]} {worker}</button>
      </div>
    </Modal>
  );
}

/** What will happen, in words. */
function consequence(action: Action, role: "a" | "e", worker: AttentionWorker | ExpertWorker): string {
  if (action === "uncordon") return role === "a" ? "The worker takes new sequences again." : "The worker is given experts again, from the next placement on.";
  if (role === "a") {
    const running = (worker as AttentionWorker).load?.[2] ?? 0;
    const rest = `${count(running)} running ${plural(running, "sequence")}`;
    return action === "drain"
      ? `The worker takes no new sequences; its ${rest} run to their end. When none is left it can be stopped. It stays so until it is uncordoned.`
      : `The worker takes no new sequences; its ${rest} go on. It stays so until it is uncordoned.`;
  }
  const experts = `${count((worker as ExpertWorker).experts)} ${plural((worker as ExpertWorker).experts, "expert")}`;
  return action === "drain"
    ? `The leader places its ${experts} on other workers, which load them in the background. It serves until they have; nothing pauses. When it holds none it can be stopped. It stays so until it is uncordoned.`
    : `The worker keeps and serves its ${experts}, and is given no more of them. It stays so until it is uncordoned.`;
}

function Facts({ facts }: { facts: [string, string][] }) {
  return <dl class="facts-list">{facts.map(([name, value]) => <div key={name}><dt>{name}</dt><dd>{value}</dd></div>)}</dl>;
}

function attentionFacts(it: AttentionWorker): [string, string][] {
  const [, free = it.pages_total, running, waiting, orphans, rows, tokens, preempted, resent, hedged] = it.load ?? [];
  return [
    ["Latent cache", `${count(it.pages_total - free)} of ${count(it.pages_total)} pages of ${it.page_tokens} tokens`],
    ["Running", `${running ?? "–"}, of them without a caller ${orphans ?? "–"}`], ["Waiting", `${waiting ?? "–"} of at most ${it.waiting_max}`],
    ["Rows a step", compact(rows)], ["Tokens/s", compact(tokens)], ["Preempted", compact(preempted)],
    ["Frames resent", compact(resent)], ["Frames hedged", compact(hedged)], ["Sends under epoch", String(it.epoch)],
  ];
}

function expertFacts(it: ExpertWorker): [string, string][] {
  const bound = it.slots > 0 ? ` of at most ${count(it.slots)}` : "";
  return [["Experts", `${count(it.experts)}${bound}`], ["Has loaded epoch", String(it.epoch_loaded)]];
}

function EdgeTable({ cluster, role, n }: { cluster: Cluster; role: "a" | "e"; n: number }) {
  const edges = cluster.edgesOf(role, n);
  if (edges.length === 0) return null;
  return (
    <Scroll label="Edges">
      <table>
        <thead><tr><th scope="col">{role === "a" ? "To" : "From"}</th><th scope="col">State</th><th scope="col" class="num">Rows/s</th><th scope="col" class="num">A frame takes</th></tr></thead>
        <tbody>
          {edges.map((edge) => (
            <tr key={`${edge.a} ${edge.e}`}>
              <th scope="row">{role === "a" ? cluster.experts.get(edge.e)?.id : cluster.attention.get(edge.a)?.id}</th>
              <td><State health={{ tone: EDGE_TONES[edge.state], label: edge.state }} /></td>
              <td class="num">{compact(edge.terms_per_s)}</td><td class="num">{us(edge.answer_us)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </Scroll>
  );
}
