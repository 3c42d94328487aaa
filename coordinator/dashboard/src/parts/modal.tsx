// A modal dialog, and why the buttons in it may be off.
import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef } from "preact/hooks";
import { store } from "../store.ts";

const close = (): void => store.show(null);

/** A modal dialog: the browser keeps the focus in it, closes it by Escape, and gives the focus back. */
export function Modal({ title, children }: { title: string; children: ComponentChildren }) {
  const element = useRef<HTMLDialogElement>(null);
  const id = useId();
  useEffect(() => {
    const before = document.activeElement;
    element.current?.showModal();
    return () => {
      if (before instanceof HTMLElement && before.isConnected) before.focus();
    };
  }, []);
  const outside = (event: MouseEvent): void => {
    if (event.target === element.current) close();
  };
  return (
    <dialog ref={element} aria-labelledby={id} onClose={close} onClick={outside}>
      <div class="sheet">
        <header><h2 id={id}>{title}</h2><button type="button" class="quiet square" aria-label="Close" onClick={close}>✕</button></header>
        {children}
      </div>
    </dialog>
  );
}

/** Why the operator's buttons are off; null when they are on. */
export function offBecause(): string | null {
  const { access, state } = store.link;
  if (state.at !== "open") return "Actions are off: there is no connection to the coordinator.";
  if (access?.operate) return null;
  return access?.key ? `Actions are off: the key “${access.key}” does not have the scope “operate”.` : "Actions are off: they need a key with the scope “operate”.";
}
