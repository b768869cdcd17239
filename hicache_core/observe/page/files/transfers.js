// Transfers: the KV that moved between prefill and decode nodes.

import { at, table } from "./dom.js";
import { bound, bytes, counts, number } from "./words.js";

export function showTransfers(transfers) {
  at("transfers-card").hidden = transfers.length === 0;
  const rows = transfers.map((one) => [
    one.backend, bytes(one.nbytes.sent), bytes(one.nbytes.received), counts(one.outcomes) || "none",
    number(one.in_flight.sent + one.in_flight.received), one.connections === null ? "–" : number(one.connections),
    bound(one.seconds, 0.5), bound(one.seconds, 0.99),
  ]);
  at("transfers").replaceChildren(table(["Backend", "Sent", "Received", "Ended", "In flight", "Connections", "p50", "p99"], rows));
}
