// A titled part of a view, and small things that many of them use.
import type { ComponentChildren } from "preact";
import { useId } from "preact/hooks";
import type { Health } from "../data/health.ts";

interface PanelProps {
  title: string;
  class?: string;
  /** Beside the title: a sentence, then controls. */
  note?: ComponentChildren;
  tools?: ComponentChildren;
  children: ComponentChildren;
}

export function Panel({ title, class: name = "", note, tools, children }: PanelProps) {
  const id = useId();
  return (
    <section class={`panel ${name}`} aria-labelledby={id}>
      <header class="panel-head">
        <h2 id={id}>{title}</h2>
        {note && <p class="muted">{note}</p>}
        {tools && <div class="panel-tools">{tools}</div>}
      </header>
      {children}
    </section>
  );
}

/** One choice of a few, as radio buttons that look like one control. */
export function Choice<T extends string>({ label, value, options, onChange }: { label: string; value: T; options: Record<T, string>; onChange: (value: T) => void }) {
  const name = useId();
  return (
    <fieldset class="choice">
      <legend class="hidden">{label}</legend>
      {(Object.keys(options) as T[]).map((option) => (
        <label key={option}>
          <input type="radio" name={name} checked={option === value} onChange={() => onChange(option)} />
          <span>{options[option]}</span>
        </label>
      ))}
    </fieldset>
  );
}

export const State = ({ health }: { health: Health }) => <span class={`state tone-${health.tone}`}><span class="dot" />{health.label}</span>;

/** A share as a thin bar; the number stands beside it. */
export function Bar({ share, tone = "accent" }: { share: number; tone?: string }) {
  return <span class={`bar bar-${tone}`} aria-hidden="true"><span style={{ "--share": Math.min(1, Math.max(0, share)).toFixed(3) }} /></span>;
}

/** A table that scrolls sideways where there is no room, by keyboard too. */
export function Scroll({ label, children }: { label: string; children: ComponentChildren }) {
  return <div class="scroll" role="region" aria-label={label} tabIndex={0}>{children}</div>;
}
