// The page in a browser, against a played cluster: what people do with it, and what they must be told.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { after, before, test } from "node:test";
import { MockServer } from "../../mock/server.mjs";
import { launch, PATIENCE, shown } from "./browser.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const VIEWS = ["cluster", "experts", "requests", "events", "chat"];
const CALM = { calm: true };
const TIMEOUT = { timeout: 90_000 * PATIENCE };

let browser;
before(async () => (browser = await launch()));
after(() => browser.close());

/** Runs with the page of a played cluster; its console must stay empty. */
function page(name, mock, work, context = {}) {
  test(name, TIMEOUT, async () => {
    const it = await shown(browser, { ...CALM, ...mock }, context);
    try {
      await work(it);
      assert.deepEqual(it.problems, [], "the console's errors and warnings");
    } finally {
      await it.close();
    }
  });
}

const open = (page, view) => page.locator("nav a", { hasText: new RegExp(view, "i") }).click();

page("a death shows within two seconds", {}, async ({ page, server }) => {
  await page.getByRole("button", { name: /^e1 .*live/ }).waitFor();
  const begun = Date.now();
  server.cluster.kill("e1");
  await page.getByRole("button", { name: /^e1 unreachable/ }).waitFor();
  const ms = Date.now() - begun;
  assert.ok(ms < 2000 * PATIENCE, `it took ${ms} ms`);
  await page.getByText("all 3 attention workers lost it").first().waitFor();
  await page.getByRole("button", { name: /^e1 died/ }).waitFor({ timeout: 10_000 * PATIENCE });
  await page.getByRole("log", { name: "News" }).filter({ hasText: "e1" }).waitFor({ state: "attached" });
});

page("a lost attention worker shows, and its requests are seen to move", {}, async ({ page, server }) => {
  await page.getByRole("button", { name: /^a0 .*live/ }).waitFor();
  server.cluster.kill("a0");
  await page.getByRole("button", { name: /^a0 does not answer/ }).waitFor({ timeout: 2000 * PATIENCE });
});

page("draining asks first, says what will happen, and posts", {}, async ({ page, server }) => {
  await page.getByRole("button", { name: /^e2 .*live/ }).click();
  await page.getByRole("button", { name: "Drain…" }).click();
  const dialog = page.getByRole("dialog", { name: "Drain e2?" });
  await dialog.getByText("The leader places its 64 experts on other workers").waitFor();
  assert.deepEqual(server.posts, [], "nothing before it is confirmed");
  await dialog.getByRole("button", { name: "Drain e2" }).click();
  await page.getByText("e2 is being drained.").waitFor();
  assert.deepEqual(server.posts, [{ path: "/dashboard/actions/cordon", body: { worker: "e2", cordoned: true, drain: true } }]);
  await page.getByRole("button", { name: /^e2 .*draining/ }).waitFor();
});

page("cancelling does nothing", {}, async ({ page, server }) => {
  await page.getByRole("button", { name: /^a1 .*live/ }).click();
  await page.getByRole("button", { name: "Cordon…" }).click();
  await page.getByRole("button", { name: "Cancel" }).click();
  await page.keyboard.press("Escape");
  await page.getByRole("dialog").waitFor({ state: "detached" });
  assert.deepEqual(server.posts, []);
});

page("rebalancing is a dry run first", {}, async ({ page, server }) => {
  await open(page, "Experts");
  await page.getByRole("button", { name: "Rebalance…" }).click();
  const dialog = page.getByRole("dialog");
  await dialog.getByText(/Workers load \d+ experts? in the background/).waitFor();
  assert.deepEqual(server.posts.map((post) => post.body), [{ dry_run: true }]);
  const [now, then] = (await dialog.locator("dd b").allTextContents()).map(Number);
  assert.ok(now > then && then >= 1, `imbalance ${now} -> ${then}`);
  await dialog.getByRole("button", { name: "Rebalance" }).click();
  await page.getByText(/Placement epoch \d+: \d+ experts? to load/).waitFor();
  assert.deepEqual(server.posts.map((post) => post.body), [{ dry_run: true }, { dry_run: false }]);
});

test("a wrong key is said, a right one is taken, kept for the tab and sent along", TIMEOUT, async () => {
  const it = await shown(browser, { ...CALM, keys: true });
  try {
    const { page, server } = it;
    await page.getByText(/This cluster asks for a key/).waitFor();
    await enter(page, "wrong");
    await page.getByText("The key was refused: this key is not known").waitFor();
    await enter(page, "watch-key");
    await page.getByRole("button", { name: /^e0 .*live/ }).click();
    await page.getByText("does not have the scope “operate”").waitFor();
    await page.getByRole("button", { name: "Drain…" }).click({ force: true });
    assert.equal(await page.getByRole("dialog", { name: "Drain e0?" }).count(), 0, "the button is off");
    await page.keyboard.press("Escape");
    await enter(page, "operate-key");
    await page.getByRole("button", { name: "Key: ada" }).waitFor();
    await page.reload();
    await page.getByRole("button", { name: /^e0 .*live/ }).click();
    await page.getByRole("button", { name: "Cordon…" }).click();
    await page.getByRole("button", { name: "Cordon e0" }).click();
    await page.getByText("e0 is cordoned.").waitFor();
    assert.equal(server.posts.length, 1);
    // The browser itself reports answers of 401.
    assert.deepEqual(it.problems.filter((problem) => !problem.includes("401")), []);
  } finally {
    await it.close();
  }
});

async function enter(page, key) {
  await page.getByRole("button", { name: /^Key:/ }).click();
  await page.getByRole("dialog", { name: "Key" }).getByLabel("Key", { exact: true }).fill(key);
  await page.getByRole("button", { name: "Use it" }).click();
}

test("a coordinator that is gone is said, and found again when it is back", TIMEOUT, async () => {
  const it = await shown(browser, CALM);
  const { page, server } = it;
  const { port } = server.server.address();
  const again = new MockServer(CALM);
  try {
    await page.getByRole("button", { name: /^e0 .*live/ }).waitFor();
    await server.close();
    await page.getByText(/^No connection: .* Trying again in \d+ s\. What you see is from/).waitFor();
    await page.getByText("Disconnected").waitFor();
    await again.listen(port);
    await page.getByText("Serving").waitFor({ timeout: 15_000 * PATIENCE });
    again.isMute = true;
    await page.getByText(/Nothing has come from the coordinator for \d+ s/).waitFor({ timeout: 8_000 * PATIENCE });
    await page.getByText("Stale").waitFor();
    again.isMute = false;
    await page.getByText("Serving").waitFor();
  } finally {
    await page.context().close();
    await again.close();
  }
});

page("the chat streams reasoning apart from the answer", {}, async ({ page }) => {
  await open(page, "Chat");
  await page.getByLabel("Message").fill("What is 347 + 586?");
  await page.keyboard.press("Enter");
  await page.locator(".reply .answer").filter({ hasText: /^933$/ }).waitFor();
  await page.getByText("The answer is complete.").waitFor({ state: "attached" });
  assert.match(await page.locator(".reply details p").textContent(), /^7\+6\+0=13 write 3 carry 1/);
  assert.match(await page.locator(".reply .facts").textContent(), /\d+ tokens · [\d.]+ tokens\/s · first after/);
});

page("a chat can be stopped", { token_ms: 200 }, async ({ page }) => {
  await open(page, "Chat");
  await page.getByLabel("Message").fill("What is 123456789 + 987654321?");
  await page.getByRole("button", { name: "Send" }).click();
  await page.locator(".reply details p").waitFor();
  await page.getByRole("button", { name: "Stop" }).click();
  await page.getByText("Stopped.").waitFor();
  assert.equal(await page.locator(".reply .answer").count(), 0);
});

page("the keyboard reaches everything", {}, async ({ page, server }) => {
  await page.getByRole("button", { name: /^e0 .*live/ }).waitFor();
  server.cluster.slow("a1", "e2");
  await page.locator(".feed").getByText("its rows go elsewhere").waitFor();
  const seen = new Set();
  for (let i = 0; i < 40; i++) {
    await page.keyboard.press("Tab");
    seen.add(await page.evaluate(() => document.activeElement?.getAttribute("aria-label") ?? document.activeElement?.textContent ?? ""));
  }
  const all = [...seen].join("\n");
  for (const name of ["Skip to the content", "Experts", "Key: none", "Theme:", "a0 ", "e0 64 experts, live", "Events, newest first", "All events"]) {
    assert.ok(all.includes(name), `${name} is not among\n${all}`);
  }
  // Arrows move within a column; Enter opens; Escape closes and gives the focus back.
  await page.getByRole("button", { name: /^e0 .*live/ }).focus();
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("Enter");
  await page.getByRole("dialog", { name: "e2" }).waitFor();
  await page.keyboard.press("Escape");
  await page.getByRole("dialog").waitFor({ state: "detached" });
  assert.match(await page.evaluate(() => document.activeElement.getAttribute("aria-label")), /^e2 /);
  // In the heat map too.
  await open(page, "Experts");
  await page.getByRole("application").focus();
  for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"]) await page.keyboard.press(key);
  await page.getByText(/^Layer 2, expert 1: .*the layer's mean; held by e\d, e\d, 2 of 2 live$/).waitFor();
});

page("tables say what the pictures show", {}, async ({ page }) => {
  await page.getByRole("radio", { name: "Table" }).check({ force: true });
  await page.getByRole("row", { name: /e3 expert n1 live 64 experts/ }).waitFor();
  await open(page, "Experts");
  await page.getByRole("radio", { name: "Table" }).check({ force: true });
  await page.getByRole("combobox", { name: "Layer" }).selectOption("3");
  assert.equal(await page.getByRole("row").count(), 33);
});

page("events and requests are filtered", {}, async ({ page, server }) => {
  server.cluster.slow("a1", "e2");
  server.cluster.cordon({ worker: "e3", cordoned: true, drain: false });
  await open(page, "Events");
  await page.getByText("e3", { exact: true }).waitFor();
  await page.getByRole("radio", { name: "Edges" }).check({ force: true });
  assert.deepEqual(await page.locator(".feed li b").allTextContents(), ["a1 → e2"]);
  await open(page, "Requests");
  await page.getByRole("searchbox", { name: "Filter" }).fill("no such request");
  await page.getByText(/None matches|Nobody waits/).waitFor();
});

for (const colorScheme of ["light", "dark"]) {
  page(`axe finds nothing, ${colorScheme}`, {}, async ({ page, server }) => {
    server.cluster.slow("a1", "e2");
    await page.getByRole("button", { name: /^e2 .*slow/ }).waitFor();
    const findings = [];
    const check = async (where) => {
      const found = await page.evaluate(async (axe) => {
        if (!window.axe) new Function(axe)();
        return (await window.axe.run(document)).violations.map((v) => `${v.id}: ${v.nodes.map((node) => node.html.slice(0, 160)).join(" | ")}`);
      }, AXE);
      findings.push(...found.map((text) => `${where}: ${text}`));
    };
    for (const view of VIEWS) {
      await open(page, view);
      await page.waitForTimeout(300);
      await check(view);
    }
    await open(page, "Cluster");
    await page.getByRole("button", { name: /^e2 .*slow/ }).click();
    await check("a worker's sheet");
    assert.deepEqual(findings, []);
  }, { colorScheme, bypassCSP: true });
}

page("nothing is wider than a phone", {}, async ({ page }) => {
  await page.getByRole("button", { name: /^e0 .*live/ }).waitFor();
  for (const view of VIEWS) {
    await open(page, view);
    await page.waitForTimeout(200);
    const [inner, outer] = await page.evaluate(() => [document.documentElement.scrollWidth, window.innerWidth]);
    assert.ok(inner <= outer, `${view}: ${inner} > ${outer}`);
  }
}, { viewport: { width: 360, height: 740 } });
