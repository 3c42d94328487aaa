// The dialog that is open, if any: a worker's sheet with the operator's actions, rebalancing, the key.
import { useStore } from "../store.ts";
import { KeyDialog } from "./key.tsx";
import { RebalanceDialog } from "./rebalance.tsx";
import { WorkerDialog } from "./worker.tsx";

export function Dialogs() {
  const { dialog, link } = useStore();
  if (dialog?.is === "key") return <KeyDialog />;
  if (!dialog || !link.cluster) return null;
  if (dialog.is === "rebalance") return <RebalanceDialog cluster={link.cluster} />;
  return <WorkerDialog key={`${dialog.role}${dialog.n}`} cluster={link.cluster} role={dialog.role} n={dialog.n} />;
}
