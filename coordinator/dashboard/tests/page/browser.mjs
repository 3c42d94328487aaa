// A browser with the page of a played cluster in it, for the tests and the pictures.
import { chromium } from "playwright-core";
import { MockServer } from "../../mock/server.mjs";

/** Bounds on time are for an idle machine; on a busy one PATIENCE=5 makes all of them five times as long. */
export const PATIENCE = Number(process.env.PATIENCE ?? 1);

const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
  "--force-color-profile=srgb",
];

export const launch = () => chromium.launch({ timeout: 30_000 * PATIENCE, executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", headless: true, args: FLAGS });

/** Starts a played cluster and shows it. `problems`: what the console and the page complained of. */
export async function shown(browser, mock = {}, context = {}) {
  const server = await new MockServer(mock).listen();
  const opened = await browser.newContext({ viewport: { width: 1440, height: 900 }, ...context });
  const page = await opened.newPage();
  page.setDefaultTimeout(10_000 * PATIENCE);
  const problems = [];
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && problems.push(message.text()));
  page.on("pageerror", (error) => problems.push(error.message));
  page.on("request", (request) => !request.url().startsWith(server.url) && problems.push(`a request to ${request.url()}`));
  await page.goto(server.url);
  const close = async () => {
    await opened.close();
    await server.close();
  };
  return { server, page, problems, close };
}
