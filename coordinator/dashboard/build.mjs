// Builds the page into dist/. `--current` checks that dist/ is what the sources give; `--unit` builds the unit tests and runs them.
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const dist = join(here, "dist");
const BYTES_MAX = 200_000;

async function page(outdir) {
  await build({
    absWorkingDir: here,
    entryPoints: { app: "src/main.tsx" },
    outdir,
    bundle: true,
    minify: true,
    format: "iife",
    target: ["chrome123", "firefox120", "safari17.5"],
    jsx: "automatic",
    jsxImportSource: "preact",
    legalComments: "eof",
    logLevel: "warning",
  });
  for (const name of ["index.html", "icon.svg"]) writeFileSync(join(outdir, name), readFileSync(join(here, "src", name)));
  const notices = [["Preact", "preact"], ["uPlot", "uplot"]].map(
    ([title, name]) => `${title}\n\n${readFileSync(join(here, "node_modules", name, "LICENSE"), "utf8").trim()}\n`,
  );
  writeFileSync(join(outdir, "NOTICES.txt"), `This page contains:\n\n${notices.join("\n\n")}`);
  const bytes = readdirSync(outdir).reduce((sum, name) => sum + readFileSync(join(outdir, name)).length, 0);
  if (bytes > BYTES_MAX) throw new Error(`dist is ${bytes} bytes; at most ${BYTES_MAX}`);
  return bytes;
}

async function inTemporaryFolder(work) {
  const folder = mkdtempSync(join(tmpdir(), "dashboard-"));
  try {
    return await work(folder);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

async function current(folder) {
  await page(folder);
  const names = [...new Set([...readdirSync(folder), ...readdirSync(dist)])];
  const same = (name) => {
    try {
      return readFileSync(join(folder, name)).equals(readFileSync(join(dist, name)));
    } catch {
      return false;
    }
  };
  const stale = names.filter((name) => !same(name));
  if (stale.length > 0) throw new Error(`dist is not current (${stale.join(", ")}): run \`npm run build\` and commit it`);
  console.log("dist is current");
}

async function unit(outdir) {
  const tests = join(here, "tests/unit");
  const entryPoints = readdirSync(tests).filter((name) => name.endsWith(".test.ts")).map((name) => join(tests, name));
  await build({ entryPoints, outdir, bundle: true, platform: "node", format: "esm", outExtension: { ".js": ".mjs" }, logLevel: "warning" });
  const files = readdirSync(outdir).map((name) => join(outdir, name));
  execFileSync(process.execPath, ["--test", ...files], { stdio: "inherit" });
}

const mode = process.argv[2];
try {
  if (mode === "--current") await inTemporaryFolder(current);
  else if (mode === "--unit") await inTemporaryFolder(unit);
  else {
    rmSync(dist, { recursive: true, force: true });
    console.log(`dist: ${await page(dist)} bytes`);
  }
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
