// The operator's actions: each one is one POST, answered as JSON of the Admin service's messages.
import { refusal } from "./link.ts";
import type { CordonRequest, RebalanceResponse } from "./protocol.ts";
import { key } from "./settings.ts";

/** Past this an action is called lost; the page's next update says what came of it. */
const ACTION_MS = 30_000;

async function post(path: string, body: unknown): Promise<unknown> {
  const headers: Record<string, string> = { "content-type": "application/json" };
  if (key.get()) headers["authorization"] = `Bearer ${key.get()}`;
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal: AbortSignal.timeout(ACTION_MS) });
  if (!response.ok) throw new Error(await refusal(response));
  return response.json();
}

export async function cordon(request: CordonRequest): Promise<void> {
  await post("/dashboard/actions/cordon", request);
}

export async function rebalance(dry_run: boolean): Promise<RebalanceResponse> {
  return (await post("/dashboard/actions/rebalance", { dry_run })) as RebalanceResponse;
}
