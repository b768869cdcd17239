// The stores: breaker, what was moved, and how long each operation takes.

import { at, element, say, table } from "./dom.js";
import { Chart } from "./charts.js";
import { bound, BREAKERS, bytes, counts, number, seconds, total } from "./words.js";

const charts = new Map();

export function showStorage(snapshot, samples) {
  const backends = snapshot.backends;
  at("stores-none").hidden = backends.length > 0;
  say(at("queues"), backends.length ? queues(snapshot) : "");
  at("stores").replaceChildren(...backends.map((backend) => store(backend, samples)));
}

function queues(snapshot) {
  const waiting = Object.values(snapshot.queue_depths).reduce((sum, n) => sum + n, 0);
  const moving = Object.entries(snapshot.bytes_in_flight).filter(([, n]) => n).map(([way, n]) => `${way} ${bytes(n)}`);
  return [`${number(waiting)} jobs waiting`, ...moving].join(" · ");
}

function store(backend, samples) {
  const [says, level] = BREAKERS[backend.breaker] ?? [backend.breaker, ""];
  const probe = backend.next_probe_s ? `, next attempt in ${seconds(backend.next_probe_s)}` : "";
  const n = (count, what) => (count ? `${number(count)} ${what}` : null);
  const facts = [
    backend.read_only ? "read-only" : `${bytes(backend.stored_nbytes)} stored`, `${bytes(backend.loaded_nbytes)} loaded`,
    n(backend.retries, "calls retried"), n(backend.short_circuits, "calls not made"), n(backend.negative_hits, "pages not requested"),
  ].filter(Boolean).join(" · ");
  return element("div", { class: "store" },
    element("div", { class: "title" }, element("h3", {}, backend.name), element("span", { class: `chip ${level}` }, says + probe)),
    element("p", { class: "facts" }, facts),
    backend.last_error ? element("p", { class: `facts ${backend.breaker === "closed" ? "" : "bad"}` }, `Last failure: ${backend.last_error}`) : null,
    latency(backend, samples),
    backend.operations.length ? operations(backend) : null);
}

function latency(backend, samples) {
  const ops = [["get", "storage", "read"], ["set", "host", "write"], ["exists", "device", "ask"]];
  const of = (op) => samples.map((sample) => sample.operations.find((one) => one.backend === backend.name && one.op === op)?.p99_s ?? null);
  const series = ops.map(([op, kind, name]) => ({ name, kind, line: true, values: of(op) })).filter((one) => one.values.some((value) => value !== null));
  if (!series.length) return element("p", { class: "hint" }, "No calls in the last 15 minutes.");
  if (!charts.has(backend.name)) charts.set(backend.name, new Chart("Latency, p99 of each second", seconds));
  const chart = charts.get(backend.name);
  const last = series.map((one) => `${one.name} ≤ ${seconds(one.values.findLast((value) => value !== null))}`).join(", ");
  chart.show(samples.map((sample) => sample.at_s), series, { says: last });
  return chart.node;
}

function operations(backend) {
  const rows = backend.operations.map((one) => [one.op, number(total(one.latency_s)), bound(one.latency_s, 0.5), bound(one.latency_s, 0.99),
    counts(one.errors) || "0"]);
  return table(["Operation", "Calls", "p50", "p99", "Errors"], rows);
}
