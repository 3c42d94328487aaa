// The cluster as a table: what the picture shows, for those who would rather read it.
import { byId, type Cluster } from "../data/cluster.ts";
import { compact, percent } from "../data/format.ts";
import { attentionHealth, expertHealth, terms, type Health } from "../data/health.ts";
import { store } from "../store.ts";
import { Scroll, State } from "./panel.tsx";

export function WorkersTable({ cluster }: { cluster: Cluster }) {
  const rows = [
    ...cluster.coordinators.map((it) => ({ role: "coordinator", id: it.id, node: "", health: undefined, has: it.id === cluster.status.leader ? "leads" : "", does: "", address: it.address, open: undefined })),
    ...byId(cluster.attention.values()).map((it) => ({
      role: "attention", id: it.id, node: it.node, health: attentionHealth(cluster, it),
      has: `cache ${it.load ? percent(it.pages_total - it.load[1], it.pages_total) : "–"}`,
      does: it.load ? `${it.load[2]} running, ${it.load[3]} waiting` : "", address: it.address,
      open: () => store.show({ is: "worker", role: "a", n: it.n }),
    })),
    ...byId(cluster.experts.values()).map((it) => ({
      role: "expert", id: it.id, node: it.node, health: expertHealth(cluster, it), has: `${it.experts} experts`,
      does: `${compact(terms(cluster, it))} rows/s`, address: it.address,
      open: () => store.show({ is: "worker", role: "e", n: it.n }),
    })),
  ];
  return (
    <Scroll label="All members">
      <table>
        <thead><tr><th scope="col">Member</th><th scope="col">Role</th><th scope="col">Node</th><th scope="col">State</th><th scope="col">Has</th><th scope="col">Does</th><th scope="col">Address</th></tr></thead>
        <tbody>
          {rows.map((row) => (
            <tr key={`${row.role} ${row.id}`}>
              <th scope="row">{row.open ? <button type="button" class="link" onClick={row.open}>{row.id}</button> : row.id}</th>
              <td>{row.role}</td><td>{row.node || "–"}</td><td>{row.health ? <State health={row.health as Health} /> : "–"}</td>
              <td>{row.has}</td><td>{row.does}</td><td class="mono">{row.address}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </Scroll>
  );
}
