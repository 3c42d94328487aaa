// Reads a server-sent event stream from a fetch body: EventSource can send no Authorization header.

export interface ServerEvent {
  event: string;
  data: string;
}

/** Longest event that is kept: a coordinator's snapshot of a large cluster is about 200 kB. */
const EVENT_CHARS_MAX = 8_000_000;

/** Splits text that comes in pieces into events. */
export class EventParser {
  private rest = "";
  private event = "";
  private data: string[] = [];
  private chars = 0;

  /** The events that are complete with this piece. */
  push(piece: string): ServerEvent[] {
    const events: ServerEvent[] = [];
    const text = this.rest + piece;
    // A carriage return at the end may be the first half of a line's end.
    const lines = text.split(/\r\n|\n|\r(?=[^\n])/);
    this.rest = lines.pop() ?? "";
    for (const line of lines) this.line(line, events);
    if (this.rest.length + this.chars > EVENT_CHARS_MAX) throw new Error("an event is too long");
    return events;
  }

  private line(line: string, events: ServerEvent[]): void {
    if (line === "") {
      if (this.data.length > 0) events.push({ event: this.event || "message", data: this.data.join("\n") });
      this.event = "";
      this.data = [];
      this.chars = 0;
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") this.event = value;
    if (field === "data") {
      this.data.push(value);
      this.chars += value.length;
    }
  }
}

/** The events of a body, as they come. */
export async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<ServerEvent> {
  const parser = new EventParser();
  const reader = body.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
