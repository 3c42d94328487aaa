// What has happened in the cluster, newest first.
import { useState } from "preact/hooks";
import type { Cluster } from "../data/cluster.ts";
import type { EventKind } from "../data/protocol.ts";
import { Feed, KIND_NAMES } from "../parts/feed.tsx";
import { Choice, Panel } from "../parts/panel.tsx";
import { Filter } from "./requests.tsx";

const GROUPS = {
  all: "All", members: "Members", edges: "Edges", placement: "Placement", requests: "Requests",
} as const;
const GROUP_OF: Record<EventKind, Exclude<keyof typeof GROUPS, "all">> = {
  joined: "members", left: "members", died: "members", cordoned: "members", uncordoned: "members", leader: "members", registry: "members",
  edge_down: "edges", edge_slow: "edges", edge_up: "edges",
  drained: "placement", placed: "placement", resent: "requests", moved: "requests",
};

export function EventsView({ cluster }: { cluster: Cluster }) {
  const [group, setGroup] = useState<keyof typeof GROUPS>("all");
  const [wanted, setWanted] = useState("");
  const shown = cluster.events.filter((event) => {
    const text = `${KIND_NAMES[event.kind]} ${event.subject} ${event.text}`.toLowerCase();
    return (group === "all" || GROUP_OF[event.kind] === group) && text.includes(wanted.toLowerCase());
  });
  const tools = <><Choice label="Kind" value={group} options={GROUPS} onChange={setGroup} /><Filter value={wanted} onInput={setWanted} /></>;
  return <Panel title="Events" note={`${shown.length} of the newest ${cluster.events.length}`} tools={tools} class="events-all"><Feed events={shown} /></Panel>;
}
