// The page's frame: header, banner, the view that the address names, dialogs, and what screen readers are told.
import { useEffect, useRef, useState } from "preact/hooks";
import type { Cluster } from "./data/cluster.ts";
import { EVENT_TONES } from "./data/health.ts";
import { Banner } from "./parts/banner.tsx";
import { Dialogs } from "./parts/dialogs.tsx";
import { Header } from "./parts/header.tsx";
import { useStore } from "./store.ts";
import { VIEWS, type ViewName } from "./views.ts";
import { Chat } from "./views/chat.tsx";
import { ClusterView } from "./views/cluster.tsx";
import { EventsView } from "./views/events.tsx";
import { ExpertsView } from "./views/experts.tsx";
import { RequestsView } from "./views/requests.tsx";

function named(): ViewName {
  const name = location.hash.slice(1);
  return name in VIEWS ? (name as ViewName) : "cluster";
}

function useView(): ViewName {
  const [view, setView] = useState(named);
  useEffect(() => {
    const turn = (): void => setView(named());
    window.addEventListener("hashchange", turn);
    return () => window.removeEventListener("hashchange", turn);
  }, []);
  return view;
}

export function App() {
  const { link, notice } = useStore();
  const view = useView();
  const { cluster } = link;
  useEffect(() => {
    document.title = `${VIEWS[view]} · ${cluster?.model.name ?? "Moesaic"}`;
  }, [view, cluster?.model.name]);
  return (
    <>
      <a class="skip" href="#main" onClick={skip}>Skip to the content</a>
      <Header view={view} />
      <Banner />
      <main id="main" tabIndex={-1} aria-label={VIEWS[view]} class={`view view-${view}`}>
        <h1 class="hidden">{VIEWS[view]}</h1>
        {cluster ? <View view={view} cluster={cluster} /> : <Waiting />}
        {/* The conversation stays while other views are looked at. */}
        <div hidden={view !== "chat" || !cluster}><Chat /></div>
      </main>
      <Dialogs />
      <div class="notice" role="status">{notice && <p>{notice}</p>}</div>
      {cluster && <Announcer cluster={cluster} />}
    </>
  );
}

function skip(event: Event): void {
  event.preventDefault();
  document.getElementById("main")?.focus();
}

function View({ view, cluster }: { view: ViewName; cluster: Cluster }) {
  if (view === "cluster") return <ClusterView cluster={cluster} />;
  if (view === "experts") return <ExpertsView cluster={cluster} />;
  if (view === "requests") return <RequestsView cluster={cluster} />;
  if (view === "events") return <EventsView cluster={cluster} />;
  return null;
}

function Waiting() {
  const { link } = useStore();
  return <p class="empty">{link.state.at === "connecting" ? "Connecting to the coordinator…" : "Nothing is known of the cluster yet."}</p>;
}

/** Says what matters of the newest events to screen readers; not the ones that were there before. */
function Announcer({ cluster }: { cluster: Cluster }) {
  const seen = useRef<number | null>(null);
  const said = useRef("");
  const newest = cluster.events[0]?.n ?? 0;
  if (seen.current !== null && newest > seen.current) {
    const fresh = cluster.events.filter((event) => event.n > (seen.current ?? 0) && EVENT_TONES[event.kind] !== "ok");
    if (fresh.length > 0) said.current = fresh.slice(0, 3).map((event) => `${event.subject}: ${event.text}`).join(". ");
  }
  seen.current = newest;
  return <div class="hidden" role="log" aria-live="polite" aria-label="News">{said.current}</div>;
}
