// A line under the header for what one must know: data that are old, a coordinator that is gone, a key that is needed, a cluster that is hurt.
import { useEffect } from "preact/hooks";
import { clock } from "../data/format.ts";
import { clusterHealth } from "../data/health.ts";
import { STALE_MS } from "../data/link.ts";
import { key } from "../data/settings.ts";
import { store, useClock, useStore } from "../store.ts";

export function Banner() {
  useClock();
  const { link } = useStore();
  const { state, cluster } = link;
  const now = performance.now();
  const old = cluster !== null && now - link.heard > STALE_MS;
  const faded = old || (cluster !== null && (state.at === "broken" || state.at === "refused"));
  useEffect(() => void document.documentElement.toggleAttribute("data-stale", faded), [faded]);
  const since = cluster ? ` What you see is from ${clock(cluster.t)}.` : "";
  if (state.at === "refused") {
    const text = key.get() ? `The key was refused: ${state.reason}` : `This cluster asks for a key: ${state.reason}`;
    return <Line tone="warn" text={text} button="Enter a key" onClick={() => store.show({ is: "key" })} />;
  }
  if (state.at === "broken") {
    const seconds = Math.max(1, Math.ceil((state.until - now) / 1000));
    return <Line tone="bad" text={`No connection: ${state.reason}. Trying again in ${seconds} s.${since}`} said={`No connection: ${state.reason}.`} button="Try now" onClick={() => link.open()} />;
  }
  if (old) return <Line tone="warn" text={`Nothing has come from the coordinator for ${Math.floor((now - link.heard) / 1000)} s.${since}`} said="Nothing comes from the coordinator." />;
  if (!cluster) return null;
  const health = clusterHealth(cluster);
  const words = [...(health.label === "Serving" ? [] : [health.label]), ...health.issues.map((issue) => issue.label)];
  return words.length === 0 ? null : <Line tone={health.tone === "bad" ? "bad" : "warn"} text={sentence(words)} />;
}

const sentence = (words: string[]): string => {
  const text = words.join("; ");
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;
};

/** `said`: what screen readers hear, where the text changes all the time. */
function Line({ tone, text, said, button, onClick }: { tone: "warn" | "bad"; text: string; said?: string; button?: string; onClick?: () => void }) {
  return (
    <section class={`banner tone-${tone}`} aria-label="State">
      <span class="dot" />
      {said ? <p aria-hidden="true">{text}</p> : <p role="alert">{text}</p>}
      {said && <span class="hidden" role="alert">{said}</span>}
      {button && <button type="button" onClick={onClick}>{button}</button>}
    </section>
  );
}
