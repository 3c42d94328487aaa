// The stream from the coordinator: opened with the key, read, opened again with growing pauses when it breaks.
import { Cluster } from "./cluster.ts";
import type { Access, Message } from "./protocol.ts";
import { events } from "./sse.ts";

const RETRY_MIN_MS = 500;
const RETRY_MAX_MS = 10_000;
/** An update comes every second: past this what is shown is called old, and past the second one the stream is opened again. */
export const STALE_MS = 3_000;
const SILENT_MS = 12_000;

export type LinkState =
  | { at: "connecting" }
  | { at: "open" }
  /** `until`: when it is tried again, by performance.now(). */
  | { at: "broken"; reason: string; until: number }
  /** The key was refused, or is missing: nothing is tried until there is another one. */
  | { at: "refused"; reason: string };

export interface LinkView {
  state: LinkState;
  access: Access | null;
  cluster: Cluster | null;
  /** performance.now() of the newest message. */
  heard: number;
}

/** The pause before the nth try in a row, up to a quarter shorter so that pages do not come all at once. */
export function pause(tries: number, random: number): number {
  return Math.min(RETRY_MIN_MS * 2 ** tries, RETRY_MAX_MS) * (1 - random / 4);
}

class Refused extends Error {}

export class Link implements LinkView {
  state: LinkState = { at: "connecting" };
  access: Access | null = null;
  cluster: Cluster | null = null;
  heard = 0;
  private tries = 0;
  private stop = new AbortController();
  private timer = 0;

  constructor(
    private readonly key: () => string,
    private readonly changed: () => void,
  ) {}

  /** Opens the stream now, with the key as it is now; one that is open ends. */
  open(): void {
    clearTimeout(this.timer);
    this.stop.abort();
    this.stop = new AbortController();
    this.set({ at: "connecting" });
    void this.run(this.stop.signal);
  }

  private async run(signal: AbortSignal): Promise<void> {
    let silence = 0;
    const listen = new AbortController();
    signal.addEventListener("abort", () => listen.abort());
    const wait = (): void => {
      clearTimeout(silence);
      silence = window.setTimeout(() => listen.abort(new Error("nothing has come for 12 s")), SILENT_MS);
    };
    try {
      wait();
      await this.read(listen.signal, wait);
      throw new Error("the coordinator ended the stream");
    } catch (error) {
      if (signal.aborted) return;
      const reason = listen.signal.aborted ? String(listen.signal.reason.message) : words(error);
      if (error instanceof Refused) this.set({ at: "refused", reason });
      else this.retry(reason);
    } finally {
      clearTimeout(silence);
    }
  }

  private async read(signal: AbortSignal, heard: () => void): Promise<void> {
    const key = this.key();
    const headers: Record<string, string> = { accept: "text/event-stream" };
    if (key) headers["authorization"] = `Bearer ${key}`;
    const response = await fetch("/dashboard/events", { headers, signal, cache: "no-store" });
    if (response.status === 401 || response.status === 403) throw new Refused(await refusal(response));
    if (!response.ok || !response.body) throw new Error(await refusal(response));
    for await (const { event, data } of events(response.body)) {
      heard();
      this.take({ event, data: JSON.parse(data) } as Message);
    }
  }

  private take(message: Message): void {
    this.heard = performance.now();
    if (message.event === "bye") throw new Error(message.data.reason);
    if (message.event === "access") {
      if (message.data.protocol !== 1) throw new Refused("The coordinator speaks another version: load the page again.");
      this.access = message.data;
    } else if (message.event === "snapshot") {
      this.cluster = new Cluster(message.data);
      this.tries = 0;
      this.state = { at: "open" };
    } else {
      this.cluster?.apply(message);
    }
    this.changed();
  }

  private retry(reason: string): void {
    const ms = pause(this.tries++, Math.random());
    this.set({ at: "broken", reason, until: performance.now() + ms });
    this.timer = window.setTimeout(() => this.open(), ms);
  }

  private set(state: LinkState): void {
    this.state = state;
    this.changed();
  }
}

const words = (error: unknown): string => (error instanceof TypeError ? "the coordinator does not answer" : String((error as Error).message ?? error));

/** What an error answer says, in the OpenAI API's form or any other. */
export async function refusal(response: Response): Promise<string> {
  const text = await response.text().catch(() => "");
  try {
    const message: unknown = JSON.parse(text).error.message;
    if (typeof message === "string") return message;
  } catch {
    // Not in that form.
  }
  return `the coordinator answered ${response.status} ${response.statusText}`.trim();
}
