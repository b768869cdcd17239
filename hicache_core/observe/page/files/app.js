// The page: asks the server once a second and shows its answer, or that it does not answer.

import { Chart } from "./charts.js";
import { at, element, say } from "./dom.js";
import { openRequests, showRequests } from "./requests.js";
import { ask, askIfThere, useKey } from "./source.js";
import { showStorage } from "./storage.js";
import { showGroups } from "./groups.js";
import { showTransfers } from "./transfers.js";
import { openTree, showTree } from "./tree.js";
import { BREAKERS, bytes, compact, number, seconds, share, TIERS } from "./words.js";

const EVERY_MS = 1000, GONE_EVERY_MS = 2000, KEEP = 900;

const charts = { device: new Chart("Device", compact), host: new Chart("Host", compact), storage: new Chart("Storage", bytes), hits: new Chart("Prompts, tok/s", compact) };
let samples = [], startedAt = null, lastAnswer = null, turn = 0, timer = null, isLooking = false, model = "";

async function look() {
  if (isLooking) return;
  isLooking = true;
  clearTimeout(timer);
  let wait = EVERY_MS;
  try {
    const [status, history, requests, tree, engine] = await Promise.all([
      ask("status"), askIfThere(`history?after=${samples.at(-1)?.n ?? 0}`), askIfThere("requests?limit=50"),
      turn % 2 ? undefined : askIfThere("tree"), askIfThere("engine"),
    ]);
    turn += 1;
    lastAnswer = new Date();
    keep(history);
    model = (status.engine ?? engine)?.model ?? "";
    show(status, requests?.requests ?? [], status.engine ?? engine);
    if (tree !== undefined) showTree(tree);
    showLive();
  } catch (error) {
    wait = GONE_EVERY_MS;
    showGone(error);
  }
  isLooking = false;
  timer = setTimeout(look, document.hidden ? 5 * wait : wait);
}

function keep(history) {
  if (!history) return;
  if (history.started_s !== startedAt) {
    const isFirst = startedAt === null;
    startedAt = history.started_s;
    samples = [];
    if (!isFirst) return; // a new process: its samples are asked for from the first, next time
  }
  samples = [...samples, ...history.samples].slice(-KEEP);
}

function show({ snapshot, hit_rate: hitRate, write_only: writeOnly }, requests, engine) {
  at("main").classList.remove("unknown");
  const hits = TIERS.map((tier) => snapshot.hit_tokens[tier] ?? 0);
  const cached = hits.reduce((sum, n) => sum + n, 0);
  const prompt = cached + (snapshot.counters.missed_tokens ?? 0);
  at("empty").hidden = prompt > 0;
  showTiles(snapshot, hitRate, cached, prompt, engine);
  showAlarms(snapshot, writeOnly);
  showCharts(snapshot);
  showRequests(requests);
  showStorage(snapshot, samples);
  showTransfers(snapshot.transfers);
  showGroups(snapshot.groups);
}

function tile(label, value, more) {
  return element("dl", { class: "tile" }, element("dt", {}, label), element("dd", { class: "value" }, value), element("dd", { class: "more-text" }, more));
}

function showTiles(snapshot, hitRate, cached, prompt, engine) {
  const pool = (one) => (one === null ? ["none", "not configured"] : [
    share(one.n_pages - one.free_pages, one.n_pages),
    `${compact((one.n_pages - one.free_pages) * snapshot.page_size)} of ${compact(one.n_pages * snapshot.page_size)} tokens`]);
  const stored = snapshot.backends.reduce((sum, backend) => sum + backend.stored_nbytes, 0);
  const loaded = snapshot.backends.reduce((sum, backend) => sum + backend.loaded_nbytes, 0);
  const tiles = [
    tile("Hit rate", prompt ? share(cached, prompt) : "–", prompt ? `since the start; last minute ${share(hitRate, 1)}` : "no tokens yet"),
    tile("Prompt tokens", compact(prompt), `${compact(cached)} cached, ${compact(prompt - cached)} computed`),
    tile("Device filled", ...pool(snapshot.device)),
    tile("Host filled", ...pool(snapshot.host)),
    tile("Storage", snapshot.backends.length ? bytes(stored) : "none", snapshot.backends.length ? `stored; ${bytes(loaded)} loaded` : "not attached"),
  ];
  if (engine?.running !== undefined) tiles.push(tile("Running", number(engine.running), `${number(engine.waiting ?? 0)} waiting${engine.tokens_per_s === undefined ? "" : `; ${compact(engine.tokens_per_s)} tok/s`}`));
  at("tiles").replaceChildren(...tiles);
}

function showAlarms(snapshot, writeOnly) {
  const found = [];
  if (writeOnly) found.push("Storage is only written to: much is stored and nothing is loaded. “hicache why” shows what differs.");
  for (const backend of snapshot.backends) {
    if (!["open", "half_open"].includes(backend.breaker)) continue;
    const probe = backend.next_probe_s ? ` Next attempt in ${seconds(backend.next_probe_s)}.` : "";
    found.push(`Store ${backend.name}, breaker ${BREAKERS[backend.breaker][0]}, for ${seconds(Math.round(backend.breaker_since_s))}.${probe} ${backend.last_error}`);
  }
  const rejected = Object.entries(snapshot.rejected_pages).filter(([, n]) => n).map(([kind, n]) => `${kind.replaceAll("_", " ")} ${number(n)}`);
  if (rejected.length) found.push(`Objects in storage were rejected: ${rejected.join(", ")}.`);
  if (snapshot.overdue_jobs) found.push(`${number(snapshot.overdue_jobs)} storage jobs are running past their deadline.`);
  if (snapshot.quarantined_pages) found.push(`${number(snapshot.quarantined_pages)} host pages are held by stuck storage jobs.`);
  const list = at("alarms");
  list.hidden = !found.length;
  if (list.dataset.mark === found.join("\n")) return;
  list.dataset.mark = found.join("\n");
  list.replaceChildren(...found.map((text) => element("li", {}, text)));
}

function poolSeries(tier) {
  const isCounted = samples.every((sample) => sample[tier]?.evictable !== null);
  const values = (of) => samples.map((sample) => (sample[tier] ? of(sample[tier]) : 0));
  if (!isCounted) return [{ name: "used", kind: tier, values: values((pool) => pool.used) }];
  return [
    { name: "in use", kind: tier, values: values((pool) => pool.used - pool.evictable) },
    { name: "cached, evictable", kind: tier, faint: true, values: values((pool) => pool.evictable) },
  ];
}

function showCharts(snapshot) {
  const there = { device: true, host: snapshot.host !== null, storage: snapshot.backends.length > 0, hits: true };
  const times = samples.map((sample) => sample.at_s);
  const nodes = Object.keys(charts).filter((name) => there[name]).map((name) => charts[name].node);
  const box = at("charts");
  if (box.children.length !== nodes.length) box.replaceChildren(...nodes);
  const last = samples.at(-1);
  say(at("tiers-range"), last ? "in tokens, one sample per second" : "no samples yet");
  if (!last) return;
  for (const tier of ["device", "host"]) {
    if (!there[tier] || !last[tier]) continue;
    const { used, total } = last[tier];
    charts[tier].show(times, poolSeries(tier), { limit: total, says: `${compact(used)} of ${compact(total)} tokens` });
  }
  const isKnown = last.usage_nbytes !== null;
  const held = samples.map((sample) => (isKnown ? sample.usage_nbytes ?? 0 : sample.stored_nbytes));
  charts.storage.show(times, [{ name: isKnown ? "held by the stores" : "stored by this process since its start", kind: "storage", values: held }], { says: bytes(held.at(-1)) });
  charts.hits.show(times, rates(), { says: last.hit_rate ? `${share(last.hit_rate, 1)} hits` : "" });
}

function rates() {
  const rate = (of) => samples.map((sample, index) => {
    const before = samples[index - 1];
    return before ? Math.max(0, (of(sample) - of(before)) / Math.max(0.001, sample.at_s - before.at_s)) : 0;
  });
  return [...TIERS.map((tier) => ({ name: tier, kind: tier, values: rate((sample) => sample.hit_tokens[tier] ?? 0) })),
    { name: "computed", kind: "missed", values: rate((sample) => sample.missed_tokens) }];
}

function showLive() {
  at("link").dataset.state = "live";
  say(at("link-text"), "Live");
  at("gone").hidden = true;
  at("key").hidden = true;
  at("main").classList.remove("stale");
  showServer("HiCache");
}

function showGone(error) {
  at("link").dataset.state = "gone";
  at("main").classList.add("stale");
  if (error.status === 401 || error.status === 403) {
    say(at("link-text"), "API key required");
    showServer("HiCache: API key required");
    at("key").hidden = false;
    at("gone").hidden = true;
    at("main").classList.add("unknown");
    return;
  }
  say(at("link-text"), "Disconnected");
  const since = lastAnswer ? `since ${lastAnswer.toLocaleTimeString()}; below is its last answer` : "yet";
  const what = error.status ? `The server answers with an error (${error.message})` : "The server does not answer";
  say(at("gone"), `${what} ${since}. Trying again every ${GONE_EVERY_MS / 1000} seconds.`);
  at("gone").hidden = false;
  showServer("HiCache: disconnected");
}

// Names the server, so that its tab can be told from that of another one.
function showServer(what) {
  const server = [model, location.host].filter(Boolean).join(" at ");
  document.title = `${server} – ${what}`;
  say(at("server"), server);
}

at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key-value").value);
  look();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
openRequests();
openTree();
look();
