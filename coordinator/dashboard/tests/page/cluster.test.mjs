// The page of a real cluster: the program is started, asked, killed in parts and drained from the page.
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { readFileSync, readdirSync } from "node:fs";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { after, before, test } from "node:test";
import { launch, PATIENCE } from "./browser.mjs";

const PROGRAM = process.env.MOESAIC_BIN ?? fileURLToPath(new URL("../../../../target/release/moesaic", import.meta.url));
const TIMEOUT = { timeout: 120_000 * PATIENCE };

let browser, up, url;
before(async () => {
  browser = await launch();
  const size = ["--attention-workers", "2", "--expert-workers", "3", "--replicas", "2", "--threads", "1"];
  up = spawn(PROGRAM, ["up", "--processes", "--listen", "127.0.0.1:0", ...size], { stdio: ["ignore", "pipe", "inherit"] });
  url = await new Promise((resolve, reject) => {
    createInterface(up.stdout).on("line", (line) => line.startsWith("ready") && resolve(line.match(/http:\S+/)[0]));
    up.on("exit", (code) => reject(new Error(`moesaic up ended with ${code}`)));
  });
}, TIMEOUT);
after(async () => {
  await browser.close();
  const ended = new Promise((resolve) => up.on("exit", resolve));
  up.kill("SIGTERM");
  await ended;
});

/** The process of a worker, among those that `up` has started. */
function processOf(id) {
  const children = readdirSync("/proc").filter((name) => /^\d+$/.test(name)).filter((pid) => {
    try {
      const parent = readFileSync(`/proc/${pid}/stat`, "utf8").replace(/^.*\) /, "").split(" ")[1];
      return Number(parent) === up.pid && readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0").includes(`--id=${id}`);
    } catch {
      return false; // It has ended meanwhile.
    }
  });
  assert.equal(children.length, 1, `one process of ${id}`);
  return Number(children[0]);
}

/** The page, and requests that keep the cluster at work meanwhile: each must be answered rightly. */
async function shown(work) {
  const page = await browser.newPage({ viewport: { width: 1440, height: 900 } });
  page.setDefaultTimeout(20_000 * PATIENCE);
  const problems = [];
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && problems.push(message.text()));
  page.on("pageerror", (error) => problems.push(error.message));
  let isDone = false;
  let served = 0;
  const load = async () => {
    while (!isDone) {
      const body = { messages: [{ role: "user", content: "What is 347 + 586?" }], temperature: 0 };
      const headers = { "content-type": "application/json" };
      const answer = await fetch(`${url}/v1/chat/completions`, { method: "POST", headers, body: JSON.stringify(body) });
      assert.equal(answer.status, 200);
      assert.equal((await answer.json()).choices[0].message.content, "933");
      served += 1;
    }
  };
  const loads = [load(), load()];
  try {
    await page.goto(url);
    await work(page);
  } finally {
    isDone = true;
    await page.close();
  }
  await Promise.all(loads);
  assert.ok(served > 0);
  assert.deepEqual(problems, [], "the console's errors and warnings");
}

test("a killed worker shows within two seconds, and comes back", TIMEOUT, () =>
  shown(async (page) => {
    await page.getByRole("button", { name: /^e1 .*live/ }).waitFor();
    const begun = Date.now();
    process.kill(processOf("e1"), "SIGKILL");
    // It may be back before the page has looked: that it died is told all the same.
    const told = page.locator(".feed li").filter({ hasText: /died e1|edge down \* → e1/ });
    await page.getByRole("button", { name: /^e1 (unreachable|died)/ }).or(told).first().waitFor();
    const ms = Date.now() - begun;
    assert.ok(ms < 2000 * PATIENCE, `it took ${ms} ms`);
    await page.getByRole("button", { name: /^e1 .*live/ }).waitFor();
  }));

test("a worker is drained from the page, and taken back", TIMEOUT, () =>
  shown(async (page) => {
    await page.getByRole("button", { name: /^e2 .*live/ }).click();
    await page.getByRole("button", { name: "Drain…" }).click();
    await page.getByRole("dialog", { name: "Drain e2?" }).getByRole("button", { name: "Drain e2" }).click();
    await page.getByText("e2 is being drained.").waitFor();
    const status = () => execFileSync(PROGRAM, ["status", "--server", url], { encoding: "utf8" });
    const deadline = Date.now() + 30_000 * PATIENCE;
    while (!/e2 .*cordoned.*: holds 0[, ]/.test(status())) {
      assert.ok(Date.now() < deadline, status());
      await new Promise((resolve) => setTimeout(resolve, 200));
    }
    await page.keyboard.press("Escape");
    await page.getByRole("button", { name: /^e2 / }).click();
    await page.getByRole("button", { name: "Uncordon…" }).click();
    await page.getByRole("dialog", { name: "Uncordon e2?" }).getByRole("button", { name: "Uncordon e2" }).click();
    await page.getByRole("button", { name: /^e2 .*live/ }).waitFor();
    assert.doesNotMatch(status(), /e2 .*cordoned/);
  }));
