// What the chat makes of the chunks of a stream.
import assert from "node:assert/strict";
import { test } from "node:test";
import { added, speed, type Answer } from "../../src/data/chat.ts";

const NOTHING: Answer = { reasoning: "", content: "", tokens: 0, first_ms: null, last_ms: 0, finish: "" };
const chunk = (delta: { content?: string; reasoning_content?: string }, finish_reason: string | null = null) => ({ choices: [{ delta, finish_reason }] });

test("reasoning and answer are kept apart, and the server's count of tokens is the one that holds", () => {
  let answer = added(NOTHING, chunk({ content: "" }), 5);
  assert.equal(answer.first_ms, null, "the first chunk of a stream has the role and no token");
  answer = added(answer, chunk({ reasoning_content: "7+6" }), 100);
  answer = added(answer, chunk({ content: "93" }), 200);
  answer = added(answer, chunk({ content: "3" }), 300);
  answer = added(answer, chunk({}, "length"), 310);
  assert.deepEqual(answer, { reasoning: "7+6", content: "933", tokens: 3, first_ms: 100, last_ms: 300, finish: "length" });
  assert.equal(speed(answer), 10);
  answer = added(answer, { usage: { completion_tokens: 21 }, choices: [] }, 320);
  assert.deepEqual([answer.tokens, speed(answer), answer.finish], [21, 100, "length"]);
});

test("one token has no speed, and an error in the stream is one", () => {
  assert.equal(speed(NOTHING), null);
  assert.equal(speed(added(NOTHING, chunk({ content: "x" }), 9)), null);
  assert.throws(() => added(NOTHING, { error: { message: "the worker was lost" } }, 1), /the worker was lost/);
});
