// The page of a large cluster (144 workers, 2,048 edges, 14,848 experts): bytes a minute, and how smoothly it scrolls.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { MockServer } from "../../mock/server.mjs";
import { launch, PATIENCE, shown } from "./browser.mjs";

const FRAME_MS = 20 * PATIENCE;
const MINUTE_BYTES_MAX = 1_000_000;

let browser;
before(async () => (browser = await launch()));
after(() => browser.close());

test("a client gets less than 1 MB in a minute, its first one and later ones", async () => {
  const server = new MockServer({ size: "large" });
  const client = { bytes: 0, send: (text) => void (client.bytes += Buffer.byteLength(text)) };
  server.open({ writeHead() {}, on() {}, write: client.send }, server.access({ headers: {} }));
  for (let minute = 1; minute <= 3; minute++) {
    for (let second = 0; second < 60; second++) server.tick();
    console.log(`minute ${minute}: ${client.bytes} bytes`);
    assert.ok(client.bytes < MINUTE_BYTES_MAX, `minute ${minute}: ${client.bytes} bytes`);
    client.bytes = 0;
  }
});

for (const [what, view, target] of [["the page", "cluster", "html"], ["the heat map", "experts", ".heat"]]) {
  test(`${what} scrolls smoothly`, async () => {
    const it = await shown(browser, { size: "large" });
    try {
      await it.page.getByRole("button", { name: /^e100 .*live/ }).waitFor();
      await it.page.locator(`nav a[href="#${view}"]`).click();
      if (view === "experts") await it.page.getByRole("radio", { name: "L", exact: true }).check({ force: true });
      await it.page.waitForTimeout(1500);
      const used = await cpu(it.page);
      const frames = await it.page.evaluate(scroll, target);
      const cpuMs = (await used()) / frames.length;
      const p95 = frames.sort((a, b) => a - b)[Math.floor(frames.length * 0.95)];
      console.log(`${what}: ${frames.length} frames, p50 ${frames[frames.length >> 1].toFixed(1)} ms, p95 ${p95.toFixed(1)} ms, worst ${frames.at(-1).toFixed(1)} ms; ${cpuMs.toFixed(1)} ms of CPU a frame`);
      assert.ok(p95 < FRAME_MS, `the 95th percentile of a frame is ${p95} ms`);
      assert.deepEqual(it.problems, []);
    } finally {
      await it.close();
    }
  });
}

/** Begins to count; the function that it gives says how many milliseconds of CPU the page's main thread has used since. */
async function cpu(page) {
  const session = await page.context().newCDPSession(page);
  await session.send("Performance.enable", { timeDomain: "threadTicks" });
  const now = async () => (await session.send("Performance.getMetrics")).metrics.find((metric) => metric.name === "TaskDuration").value * 1000;
  const begun = await now();
  return async () => (await now()) - begun;
}

/** In the page: scrolls to and fro for five seconds; returns each frame's milliseconds. */
function scroll(target) {
  const element = document.querySelector(target);
  const [width, height] = [element.scrollWidth - element.clientWidth, element.scrollHeight - element.clientHeight];
  if (width <= 0 && height <= 0) throw new Error("there is nothing to scroll");
  const frames = [];
  return new Promise((done) => {
    let [first, last] = [0, 0];
    const frame = (now) => {
      if (last) frames.push(now - last);
      first ||= last = now;
      last = now;
      const share = (1 - Math.cos((now - first) / 400)) / 2;
      [element.scrollLeft, element.scrollTop] = [share * width, share * height];
      if (now - first < 5000) requestAnimationFrame(frame);
      else done(frames);
    };
    requestAnimationFrame(frame);
  });
}
