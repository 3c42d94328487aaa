// Rebalancing: a dry run says what it would gain, then it is confirmed.
import { useEffect, useState } from "preact/hooks";
import { rebalance } from "../data/actions.ts";
import type { Cluster } from "../data/cluster.ts";
import { count } from "../data/format.ts";
import { plural } from "../data/health.ts";
import type { RebalanceResponse } from "../data/protocol.ts";
import { store } from "../store.ts";
import { Modal } from "./modal.tsx";
import { Bar } from "./panel.tsx";

export function RebalanceDialog({ cluster }: { cluster: Cluster }) {
  const [plan, setPlan] = useState<RebalanceResponse | null>(null);
  const [error, setError] = useState("");
  const [busy, setBusy] = useState(false);
  const ask = (dryRun: boolean, then: (answer: RebalanceResponse) => void): void => {
    setBusy(true);
    setError("");
    rebalance(dryRun).then(then, (problem: Error) => setError(problem.message)).finally(() => setBusy(false));
  };
  useEffect(() => ask(true, setPlan), []);
  const confirm = (): void =>
    ask(false, (done) => {
      store.show(null);
      store.say(`Placement epoch ${done.epoch}: ${experts(done.moved)} to load.`);
    });
  return (
    <Modal title="Rebalance the experts?">
      {!plan && !error && <p class="muted" role="status">Asking what it would gain…</p>}
      {plan && <Gain plan={plan} epoch={cluster.status.epoch} />}
      {error && <p class="tone-bad" role="alert"><span class="dot" /> Not done: {error}</p>}
      <div class="buttons">
        <button type="button" onClick={() => store.show(null)}>Cancel</button>
        <button type="button" class="primary" disabled={busy || !plan || plan.moved === 0} onClick={confirm}>Rebalance</button>
      </div>
    </Modal>
  );
}

const experts = (n: number): string => `${count(n)} ${plural(n, "expert")}`;

function Gain({ plan, epoch }: { plan: RebalanceResponse; epoch: number }) {
  if (plan.moved === 0) return <p>Nothing would get better: the measured load is spread as well as it can be.</p>;
  const bar = (name: string, value: number) => (
    <div class="gain">
      <dt>{name}</dt>
      <dd><Bar share={(value - 1) / Math.max(plan.imbalance_before - 1, 0.01)} /><b>{value.toFixed(3)}</b></dd>
    </div>
  );
  return (
    <>
      <p>The most loaded worker's load over the mean, averaged over layers:</p>
      <dl>{bar("now", plan.imbalance_before)}{bar("after", plan.imbalance_after)}</dl>
      <p>Workers load {experts(plan.moved)} in the background; the placement goes from epoch {epoch} to {plan.epoch}. Both are served meanwhile, so nothing pauses.</p>
    </>
  );
}
