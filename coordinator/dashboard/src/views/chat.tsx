// A conversation with the model, to try it: reasoning apart from the answer, a button to stop, and how fast it went.
import { useEffect, useRef, useState } from "preact/hooks";
import { ask, speed, type Answer, type Turn } from "../data/chat.ts";
import { compact, ms } from "../data/format.ts";
import { Panel } from "../parts/panel.tsx";
import { store, useStore } from "../store.ts";

type Said = { role: "user"; content: string } | { role: "assistant"; answer: Answer | null; error: string; running: boolean };

export function Chat() {
  const { link } = useStore();
  const [said, setSaid] = useState<Said[]>([]);
  const [temperature, setTemperature] = useState("0.6");
  const [draft, setDraft] = useState("");
  const stop = useRef<AbortController | null>(null);
  const end = useRef<HTMLDivElement>(null);
  const running = said.some((it) => it.role === "assistant" && it.running);
  useEffect(() => end.current?.scrollIntoView({ block: "nearest" }), [said]);

  const send = async (): Promise<void> => {
    const content = draft.trim();
    const model = link.cluster?.model.name;
    if (!content || running || !model) return;
    const before: Said[] = [...said, { role: "user", content }];
    const show = (answer: Answer | null, error = "", isRunning = true): void => setSaid([...before, { role: "assistant", answer, error, running: isRunning }]);
    let newest: Answer | null = null;
    setDraft("");
    show(null);
    stop.current = new AbortController();
    try {
      await ask(model, turns(before), Number(temperature), stop.current.signal, (answer) => show((newest = answer)));
      show(newest, "", false);
    } catch (problem) {
      show(newest, stop.current.signal.aborted ? "Stopped." : `No answer: ${(problem as Error).message}`, false);
    }
  };
  const pressed = (event: KeyboardEvent): void => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    void send();
  };
  const may = link.access?.infer !== false;
  return (
    <Panel title="Chat" note={link.cluster?.model.name} class="chat" tools={said.length > 0 && !running && <button type="button" onClick={() => setSaid([])}>New conversation</button>}>
      <div class="turns" role="log" aria-label="Conversation" aria-live="off" tabIndex={0}>
        {said.length === 0 && <p class="empty">Ask the model something. The conversation stays in this tab.</p>}
        {said.map((it, i) => (it.role === "user" ? <p key={i} class="turn user">{it.content}</p> : <Reply key={i} {...it} />))}
        <div ref={end} />
      </div>
      <form class="ask" onSubmit={(event) => { event.preventDefault(); void send(); }}>
        <textarea rows={2} aria-label="Message" placeholder={may ? "Message" : "This key may not ask the model"} disabled={!may} value={draft} onInput={(event) => setDraft(event.currentTarget.value)} onKeyDown={pressed} />
        <label class="inline">Temperature <input type="number" min="0" max="2" step="0.1" value={temperature} onInput={(event) => setTemperature(event.currentTarget.value)} /></label>
        {running
          ? <button type="button" onClick={() => stop.current?.abort()}>Stop</button>
          : <button type="submit" class="primary" disabled={!may || draft.trim() === ""}>Send</button>}
      </form>
      {!may && <p class="muted">Enter a key that may ask the model: <button type="button" class="link" onClick={() => store.show({ is: "key" })}>Key</button></p>}
    </Panel>
  );
}

/** What the model is told: answers without their reasoning, and nothing of those that failed. */
function turns(said: Said[]): Turn[] {
  return said.flatMap((it): Turn[] => (it.role === "user" ? [it] : it.answer?.content ? [{ role: "assistant", content: it.answer.content }] : []));
}

function Reply({ answer, error, running }: Extract<Said, { role: "assistant" }>) {
  const rate = answer && speed(answer);
  const facts = answer?.first_ms != null && [
    `${answer.tokens} tokens`, rate ? `${compact(rate)} tokens/s` : "", `first after ${ms(answer.first_ms)}`,
    answer.finish && answer.finish !== "stop" ? `ended by ${answer.finish}` : "",
  ].filter(Boolean).join(" · ");
  return (
    <article class="turn reply" aria-busy={running} aria-label="Answer">
      {answer?.reasoning && (
        <details open={running && !answer.content}>
          <summary>Reasoning</summary>
          <p>{answer.reasoning}</p>
        </details>
      )}
      {answer?.content && <p class="answer">{answer.content}</p>}
      {running && !answer && <p class="muted">Waiting for the first token…</p>}
      {error && <p class={error === "Stopped." ? "muted" : "tone-bad"} role="alert">{error}</p>}
      {facts && <p class="muted facts">{facts}</p>}
      {!running && <span class="hidden" role="status">The answer is complete.</span>}
    </article>
  );
}
