// A list of events, newest first.
import type { ClusterEvent, EventKind } from "../data/protocol.ts";
import { clock } from "../data/format.ts";
import { EVENT_TONES } from "../data/health.ts";

export const KIND_NAMES: Record<EventKind, string> = {
  joined: "joined", left: "left", died: "died", cordoned: "cordoned", uncordoned: "uncordoned", drained: "drained",
  edge_down: "edge down", edge_slow: "edge slow", edge_up: "edge up",
  resent: "re-sent", moved: "moved", placed: "rebalanced", leader: "leader", registry: "registry",
};

export function Feed({ events }: { events: ClusterEvent[] }) {
  if (events.length === 0) return <p class="empty">Nothing has happened yet.</p>;
  return (
    <ol class="feed" tabIndex={0} aria-label="Events, newest first">
      {events.map((event) => (
        <li key={event.n} class={`tone-${EVENT_TONES[event.kind]}`}>
          <time dateTime={new Date(event.t).toISOString()}>{clock(event.t)}</time>
          <span class="dot" />
          <p><span class="kind">{KIND_NAMES[event.kind]}</span> <b>{event.subject}</b> {event.text}</p>
        </li>
      ))}
    </ol>
  );
}
