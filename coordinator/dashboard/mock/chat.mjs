// Answers of the played model: sums in tiny-r1's way, digit by digit; anything else politely.

export function answerTo(text) {
  const sum = /(\d+)\s*\+\s*(\d+)/.exec(text);
  if (!sum) return { reasoning: "The question is no sum.\n", content: "I am a played model and know sums only: try “What is 347 + 586?”" };
  const [a, b] = [sum[1], sum[2]];
  const width = Math.max(a.length, b.length);
  let [carry, steps, digits] = [0, "", ""];
  for (let i = 1; i <= width; i++) {
    const [x, y] = [Number(a.at(-i) ?? 0), Number(b.at(-i) ?? 0)];
    const all = x + y + carry;
    steps += `${x}+${y}+${carry}=${all} write ${all % 10} carry ${Math.floor(all / 10)}\n`;
    [digits, carry] = [`${all % 10}${digits}`, Math.floor(all / 10)];
  }
  return { reasoning: steps, content: `${carry || ""}${digits}` };
}

/** Streams an answer as the OpenAI API does; ends early when the client has gone. */
export async function stream(response, model, text, msPerToken) {
  const { reasoning, content } = answerTo(text);
  const pieces = [...(reasoning.match(/.{1,3}|\n/g) ?? []).map((piece) => ({ reasoning_content: piece })), ...(content.match(/\S+\s*/g) ?? []).map((piece) => ({ content: piece }))];
  const head = { id: "chatcmpl-played", object: "chat.completion.chunk", created: Math.floor(Date.now() / 1000), model };
  const send = (rest) => response.write(`data: ${JSON.stringify({ ...head, ...rest })}\n\n`);
  response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-store" });
  send({ choices: [{ index: 0, delta: { role: "assistant", content: "" }, finish_reason: null }], usage: null });
  for (const delta of pieces) {
    await new Promise((done) => setTimeout(done, msPerToken));
    if (response.destroyed) return;
    send({ choices: [{ index: 0, delta, finish_reason: null }], usage: null });
  }
  send({ choices: [{ index: 0, delta: {}, finish_reason: "stop" }], usage: null });
  send({ choices: [], usage: { prompt_tokens: 12, completion_tokens: pieces.length, total_tokens: 12 + pieces.length } });
  response.end("data: [DONE]\n\n");
}
