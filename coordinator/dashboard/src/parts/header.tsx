// The top of the page: whose cluster this is, how it does, the views, the key, the theme.
import { useState } from "preact/hooks";
import { VIEWS, type ViewName } from "../views.ts";
import { clusterHealth, type Tone } from "../data/health.ts";
import { STALE_MS } from "../data/link.ts";
import { currentTheme, setTheme, type Theme } from "../data/settings.ts";
import { store, useClock, useStore } from "../store.ts";
import { Key, Logo, Moon, Sun, System } from "./icons.tsx";

export function Header({ view }: { view: ViewName }) {
  const { link } = useStore();
  const counts: Partial<Record<ViewName, number>> = link.cluster ? { requests: link.cluster.requests_total } : {};
  return (
    <header class="top">
      <div class="brand">
        <Logo />
        <span class="wordmark">Moesaic</span>
        {link.cluster && <span class="model" title={`numerics ${link.cluster.model.numerics}`}>{link.cluster.model.name}</span>}
      </div>
      <nav aria-label="Views">
        {(Object.keys(VIEWS) as ViewName[]).map((name) => (
          <a key={name} href={`#${name}`} aria-current={name === view ? "page" : undefined}>
            {VIEWS[name]}{counts[name] ? <span class="tally">{counts[name]}<span class="hidden"> in flight</span></span> : null}
          </a>
        ))}
      </nav>
      <div class="tools">
        <Pill />
        <KeyButton />
        <ThemeButton />
      </div>
    </header>
  );
}

function Pill() {
  useClock();
  const { tone, label } = situation();
  return <span class={`pill tone-${tone}`}><span class="dot" />{label}</span>;
}

function situation(): { tone: Tone; label: string } {
  const { state, cluster, heard } = store.link;
  if (state.at === "refused") return { tone: "warn", label: "Key needed" };
  if (state.at === "broken") return { tone: "bad", label: "Disconnected" };
  if (!cluster) return { tone: "off", label: "Connecting" };
  if (performance.now() - heard > STALE_MS) return { tone: "warn", label: "Stale" };
  const health = clusterHealth(cluster);
  return { tone: health.tone, label: health.label.startsWith("Not serving") ? "Not serving" : health.label };
}

function KeyButton() {
  const { access } = store.link;
  const label = !access?.keys ? "Key" : access.key ?? "Key";
  return (
    <button type="button" class="quiet" aria-label={`Key: ${access?.key ?? "none"}`} onClick={() => store.show({ is: "key" })}>
      <Key /><span class="wide">{label}</span>
    </button>
  );
}

const THEMES: Record<Theme, { next: Theme; name: string; icon: () => preact.JSX.Element }> = {
  "": { next: "light", name: "as the system", icon: System },
  light: { next: "dark", name: "light", icon: Sun },
  dark: { next: "", name: "dark", icon: Moon },
};

function ThemeButton() {
  const [theme, turn] = useState(currentTheme);
  const { next, name, icon: Picture } = THEMES[theme];
  const click = (): void => {
    setTheme(next);
    turn(next);
  };
  return <button type="button" class="quiet square" aria-label={`Theme: ${name}; change to ${THEMES[next].name}`} title={`Theme: ${name}`} onClick={click}><Picture /></button>;
}
