// One streamed chat completion: asks, reads, and says what came as it comes.
import { refusal } from "./link.ts";
import { key } from "./settings.ts";
import { events } from "./sse.ts";

export interface Turn {
  role: "user" | "assistant";
  content: string;
}

export interface Answer {
  reasoning: string;
  content: string;
  tokens: number;
  /** Milliseconds from the question to the first token, and to the newest. */
  first_ms: number | null;
  last_ms: number;
  finish: string;
}

interface Chunk {
  error?: { message: string };
  usage?: { completion_tokens: number } | null;
  choices?: { delta: { content?: string | null; reasoning_content?: string | null }; finish_reason: string | null }[];
}

export async function ask(model: string, messages: Turn[], temperature: number, signal: AbortSignal, news: (answer: Answer) => void): Promise<void> {
  const begun = performance.now();
  const headers: Record<string, string> = { "content-type": "application/json" };
  if (key.get()) headers["authorization"] = `Bearer ${key.get()}`;
  const body = JSON.stringify({ model, messages, temperature, stream: true, stream_options: { include_usage: true } });
  const response = await fetch("/v1/chat/completions", { method: "POST", headers, body, signal });
  if (!response.ok || !response.body) throw new Error(await refusal(response));
  let answer: Answer = { reasoning: "", content: "", tokens: 0, first_ms: null, last_ms: 0, finish: "" };
  for await (const { data } of events(response.body)) {
    if (data === "[DONE]") return;
    answer = added(answer, JSON.parse(data) as Chunk, performance.now() - begun);
    news(answer);
  }
  if (!answer.finish) throw new Error("the answer broke off");
}

/** An answer with one more chunk. A chunk counts as a token until the server says how many there were. */
export function added(answer: Answer, chunk: Chunk, ms: number): Answer {
  if (chunk.error) throw new Error(chunk.error.message);
  const choice = chunk.choices?.[0];
  const [reasoning, content] = [choice?.delta.reasoning_content ?? "", choice?.delta.content ?? ""];
  const isText = reasoning !== "" || content !== "";
  return {
    reasoning: answer.reasoning + reasoning,
    content: answer.content + content,
    tokens: chunk.usage?.completion_tokens ?? answer.tokens + (isText ? 1 : 0),
    first_ms: answer.first_ms ?? (isText ? ms : null),
    last_ms: isText ? ms : answer.last_ms,
    finish: choice?.finish_reason ?? answer.finish,
  };
}

/** Tokens a second after the first one; null until there are two. */
export function speed(answer: Answer): number | null {
  const seconds = (answer.last_ms - (answer.first_ms ?? 0)) / 1000;
  return answer.tokens < 2 || seconds <= 0 ? null : (answer.tokens - 1) / seconds;
}
