// Serves dist/ and plays a cluster over the page's protocol: `node mock/server.mjs [--small | --large] [--port N] [--keys] [--calm]`.
// With --keys, "watch-key" may watch and "operate-key" may do everything. Prints each client's bytes a minute.
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { stream } from "./chat.mjs";
import { MockCluster } from "./cluster.mjs";

const DIST = join(dirname(fileURLToPath(import.meta.url)), "../dist");
const HEAT_S = 5;
const HEAT_LARGE_S = 10;
const HEAT_LARGE = 8192;
const BODY_BYTES_MAX = 1_000_000;
export const CSP = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'";

const FILES = {
  "/": ["index.html", "text/html; charset=utf-8"],
  "/dashboard/app.js": ["app.js", "text/javascript; charset=utf-8"],
  "/dashboard/app.css": ["app.css", "text/css; charset=utf-8"],
  "/dashboard/icon.svg": ["icon.svg", "image/svg+xml"],
  "/dashboard/NOTICES.txt": ["NOTICES.txt", "text/plain; charset=utf-8"],
};
const KEYS = {
  "watch-key": { key: "wall-screen", infer: false, operate: false },
  "operate-key": { key: "ada", infer: true, operate: true },
};

export class MockServer {
  constructor({ size = "small", keys = false, calm = false, seed = 7, tick_ms = 1000, token_ms = 30 } = {}) {
    Object.assign(this, { size, keys, token_ms, tick_ms });
    this.cluster = new MockCluster(size, { calm, seed });
    this.clients = new Set();
    this.posts = [];
    this.ticks = 0;
    /** Tests set these: nothing is sent; nobody is answered. */
    this.isMute = false;
    this.server = createServer((request, response) => void this.handle(request, response));
  }

  async listen(port = 0) {
    await new Promise((done) => this.server.listen(port, "127.0.0.1", done));
    this.timer = setInterval(() => this.tick(), this.tick_ms);
    this.url = `http://127.0.0.1:${this.server.address().port}`;
    return this;
  }

  async close() {
    clearInterval(this.timer);
    const closed = new Promise((done) => this.server.close(done));
    this.server.closeAllConnections();
    await closed;
  }

  tick() {
    const update = this.cluster.tick();
    this.ticks += 1;
    if (this.isMute) return;
    const every = this.cluster.loads.length > HEAT_LARGE ? HEAT_LARGE_S : HEAT_S;
    const messages = [["update", update]];
    if (this.cluster.takePlaced()) messages.push(["placement", this.cluster.placementMessage()]);
    if (this.ticks % every === 0) messages.push(["heat", this.cluster.heatMessage()]);
    const text = messages.map(framed).join("");
    for (const client of this.clients) client.send(text);
  }

  async handle(request, response) {
    const path = new URL(request.url, "http://localhost").pathname;
    const headers = { "content-security-policy": CSP, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer" };
    for (const [name, value] of Object.entries(headers)) response.setHeader(name, value);
    const file = FILES[path];
    if (file && request.method === "GET") return void response.writeHead(200, { "content-type": file[1], "cache-control": "no-cache" }).end(readFileSync(join(DIST, file[0])));
    const access = this.access(request);
    if (!access) return refuse(response, 401, "this key is not known");
    const route = `${request.method} ${path}`;
    if (route === "GET /dashboard/events") return this.open(response, access);
    const body = await read(request);
    if (route === "POST /v1/chat/completions") return access.infer ? this.chat(response, body) : refuse(response, 403, "this key may not ask the model");
    if (!route.startsWith("POST /dashboard/actions/")) return refuse(response, 404, `no such path: ${path}`);
    if (!access.operate) return refuse(response, 403, "this key may not operate the cluster");
    this.posts.push({ path, body });
    if (path.endsWith("/cordon")) return this.cluster.cordon(body) ? reply(response, {}) : refuse(response, 404, `no worker has the id ${body.worker}`);
    if (path.endsWith("/rebalance")) return reply(response, this.cluster.rebalance(body.dry_run));
    return refuse(response, 404, `no such path: ${path}`);
  }

  access(request) {
    if (!this.keys) return { protocol: 1, keys: false, key: null, infer: true, operate: true };
    const own = KEYS[request.headers.authorization?.replace(/^Bearer /, "")];
    return own && { protocol: 1, keys: true, ...own };
  }

  open(response, access) {
    response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-store" });
    const client = { bytes: 0, since: Date.now(), send: (text) => void (response.write(text), (client.bytes += Buffer.byteLength(text))) };
    const { cluster } = this;
    const first = [["access", access], ["snapshot", cluster.snapshot()], ["placement", cluster.placementMessage()], ["heat", cluster.heatMessage()]];
    client.first = first.map(framed).map((text) => (client.send(text), Buffer.byteLength(text)));
    this.clients.add(client);
    response.on("close", () => this.clients.delete(client));
  }

  chat(response, body) {
    const text = body.messages?.at(-1)?.content;
    if (typeof text !== "string") return refuse(response, 400, "messages: is not set");
    return stream(response, body.model, text, this.token_ms);
  }
}

const framed = ([event, data]) => `event: ${event}\ndata: ${JSON.stringify(data)}\n\n`;
const reply = (response, body, status = 200) => void response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(body));
const refuse = (response, status, message) => reply(response, { error: { message, type: "invalid_request_error", param: null, code: null } }, status);

async function read(request) {
  let text = "";
  for await (const piece of request) {
    text += piece;
    if (text.length > BODY_BYTES_MAX) return {};
  }
  try {
    return JSON.parse(text);
  } catch {
    return {};
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const has = (name) => process.argv.includes(name);
  const port = Number(process.argv[process.argv.indexOf("--port") + 1]) || 8080;
  const server = await new MockServer({ size: has("--large") ? "large" : "small", keys: has("--keys"), calm: has("--calm") }).listen(port);
  console.log(`a played ${server.size} cluster at ${server.url}`);
  setInterval(() => {
    for (const client of server.clients) {
      const minutes = (Date.now() - client.since) / 60_000;
      console.log(`a client: ${Math.round(client.bytes / 1000)} kB in ${minutes.toFixed(1)} min, of them ${Math.round(client.first.reduce((a, b) => a + b) / 1000)} kB at first`);
    }
  }, 60_000).unref();
}
