// The key: kept for this tab alone, sent with every call.
import { useState } from "preact/hooks";
import { key } from "../data/settings.ts";
import { store } from "../store.ts";
import { Modal } from "./modal.tsx";

export function KeyDialog() {
  const [value, setValue] = useState(key.get());
  const { access, state } = store.link;
  const use = (next: string): void => {
    key.set(next.trim());
    store.show(null);
    store.link.open();
  };
  const submit = (event: Event): void => {
    event.preventDefault();
    use(value);
  };
  return (
    <Modal title="Key">
      <form onSubmit={submit}>
        {state.at === "refused" && <p class="tone-warn"><span class="dot" /> {state.reason}</p>}
        {access && !access.keys && <p>This cluster asks nobody for a key.</p>}
        {access?.key && state.at === "open" && <p>In use: <b>{access.key}</b>. It may {may(access.infer, access.operate)}.</p>}
        <label class="field">Key
          <input type="password" autocomplete="off" spellcheck={false} value={value} onInput={(event) => setValue(event.currentTarget.value)} autofocus />
        </label>
        <p class="muted">Kept until this tab is closed, and sent to this coordinator alone.</p>
        <div class="buttons">
          {key.get() && <button type="button" onClick={() => use("")}>Forget it</button>}
          <button type="submit" class="primary">Use it</button>
        </div>
      </form>
    </Modal>
  );
}

const may = (infer: boolean, operate: boolean): string => ["watch", infer ? "ask the model" : "", operate ? "operate the cluster" : ""].filter(Boolean).join(", ");
