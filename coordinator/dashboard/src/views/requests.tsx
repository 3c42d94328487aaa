// This coordinator's requests in flight: where they are and how far. Never what they say.
import { useState } from "preact/hooks";
import type { Cluster } from "../data/cluster.ts";
import { age, count } from "../data/format.ts";
import type { Tone } from "../data/health.ts";
import type { RequestState } from "../data/protocol.ts";
import { Panel, Scroll, State } from "../parts/panel.tsx";

const TONES: Record<RequestState, Tone> = { placing: "note", prefill: "note", decode: "ok", recovering: "warn" };

export function RequestsView({ cluster }: { cluster: Cluster }) {
  const [wanted, setWanted] = useState("");
  const all = [...cluster.requests.values()].sort((a, b) => a.started - b.started);
  const shown = all.filter((it) => `${it.id} ${it.key} ${it.worker} ${it.state}`.toLowerCase().includes(wanted.toLowerCase()));
  const more = cluster.requests_total - all.length;
  const note = `${count(cluster.requests_total)} at this coordinator${more > 0 ? `; the ${count(all.length)} oldest are listed` : ""}`;
  return (
    <Panel title="Requests in flight" note={note} tools={<Filter value={wanted} onInput={setWanted} />}>
      {shown.length === 0 ? <p class="empty">{all.length === 0 ? "Nobody waits for an answer." : "None matches."}</p> : (
        <Scroll label="Table of requests">
          <table>
            <thead>
              <tr>
                <th scope="col">Request</th><th scope="col">State</th><th scope="col">Key</th><th scope="col">Attention worker</th>
                <th scope="col" class="num">Prompt</th><th scope="col" class="num">Emitted</th><th scope="col" class="num">Age</th>
              </tr>
            </thead>
            <tbody>
              {shown.map((it) => (
                <tr key={it.n}>
                  <th scope="row" class="mono">{it.id}</th><td><State health={{ tone: TONES[it.state], label: it.state }} /></td><td>{it.key || "–"}</td><td>{it.worker || "–"}</td>
                  <td class="num">{count(it.prompt)}</td><td class="num">{count(it.emitted)}</td><td class="num">{age(cluster.t - it.started)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </Scroll>
      )}
    </Panel>
  );
}

export function Filter({ value, onInput }: { value: string; onInput: (value: string) => void }) {
  return <input type="search" class="filter" placeholder="Filter" aria-label="Filter" value={value} onInput={(event) => onInput(event.currentTarget.value)} />;
}
