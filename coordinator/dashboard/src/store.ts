// The one thing that all parts of the page look at: the link to the coordinator, and which dialog is open.
import { useEffect, useState } from "preact/hooks";
import { Link } from "./data/link.ts";
import type { Num } from "./data/protocol.ts";
import { key } from "./data/settings.ts";

export type Dialog = { is: "worker"; role: "a" | "e"; n: Num } | { is: "rebalance" } | { is: "key" } | null;

const listeners = new Set<() => void>();
const changed = (): void => listeners.forEach((listener) => listener());

class Store {
  readonly link = new Link(key.get, changed);
  dialog: Dialog = null;
  /** What the last action came to, said aloud; empty after a while. */
  notice = "";
  private timer = 0;

  show(dialog: Dialog): void {
    this.dialog = dialog;
    changed();
  }

  say(notice: string): void {
    this.notice = notice;
    clearTimeout(this.timer);
    this.timer = window.setTimeout(() => {
      this.notice = "";
      changed();
    }, 8_000);
    changed();
  }
}

export const store = new Store();

/** Draws the component again whenever something has changed. */
export function useStore(): Store {
  const [, turn] = useState(0);
  useEffect(() => {
    const listener = (): void => turn((n) => n + 1);
    listeners.add(listener);
    return () => void listeners.delete(listener);
  }, []);
  return store;
}

/** Draws the component again every half second: what is not heard makes no call. */
export function useClock(): void {
  const [, turn] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => turn((n) => n + 1), 500);
    return () => clearInterval(timer);
  }, []);
}
