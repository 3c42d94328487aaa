// Takes pictures of the page: `node tests/page/pictures.mjs FOLDER [small] [large] [VIEW...]`, in three sizes, light and dark.
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { launch, shown } from "./browser.mjs";

const VIEWPORTS = { "1440x900": [1440, 900], "1024x768": [1024, 768], "390x844": [390, 844] };
const VIEWS = ["cluster", "experts", "requests", "events", "chat"];
const [folder = "screenshots", ...words] = process.argv.slice(2);
const chosen = (all) => (all.some((name) => words.includes(name)) ? all.filter((name) => words.includes(name)) : all);
const fullPage = words.includes("full");

mkdirSync(folder, { recursive: true });
const browser = await launch();
for (const size of chosen(["small", "large"])) {
  const { server, page, close } = await shown(browser, { size, seed: 11 });
  await page.getByRole("heading", { name: "Layers × experts" }).or(page.locator(".topology")).first().waitFor();
  server.cluster.slow("a1", "e2");
  await page.waitForTimeout(4000);
  for (const view of chosen(VIEWS)) {
    await page.evaluate((name) => void (location.hash = name), view);
    if (view === "chat" && words.length === 0) await ask(page);
    for (const [name, [width, height]] of Object.entries(VIEWPORTS)) {
      for (const colorScheme of chosen(["light", "dark"])) {
        await page.setViewportSize({ width, height });
        await page.emulateMedia({ colorScheme });
        await page.waitForTimeout(700);
        await page.screenshot({ path: join(folder, `${size}-${view}-${name}-${colorScheme}.png`), fullPage });
      }
    }
  }
  await close();
}
await browser.close();

async function ask(page) {
  await page.getByLabel("Message").fill("What is 347 + 586?");
  await page.getByRole("button", { name: "Send" }).click();
  await page.getByText("The answer is complete.").waitFor({ state: "attached" });
}
