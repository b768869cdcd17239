// Recent requests: where the tokens of each came from, and why some were not cached.

import { at, element, say } from "./dom.js";
import { ask } from "./source.js";
import { number, reason, seconds, share, whence } from "./words.js";

const FEW = 12, MANY = 50;
const PARTS = ["device", "host", "storage", "missed"];

let open = null, all = false, records = [];

export function showRequests(given) {
  records = given;
  draw();
}

export function openRequests() {
  at("requests-more").addEventListener("click", () => { all = !all; draw(); });
  at("find").addEventListener("submit", (event) => {
    event.preventDefault();
    find(at("find-id").value.trim());
  });
}

async function find(id) {
  if (!id) return at("found").replaceChildren();
  let card;
  try {
    card = explained(await ask(`explain/${encodeURIComponent(id)}`));
  } catch (error) {
    const unknown = error.status === 404;
    card = element("div", { class: "why" }, element("p", {}, unknown
      ? `No record of a request “${id}”. Only the last thousand requests are kept.` : `The server did not answer: ${error.message}`));
  }
  at("found").replaceChildren(card);
}

function draw() {
  at("requests-none").hidden = records.length > 0;
  at("find").hidden = records.length === 0;
  const more = at("requests-more");
  more.hidden = records.length <= FEW;
  say(more, all ? "Show fewer" : "Show more");
  const shown = records.slice(0, all ? MANY : FEW);
  const list = at("requests");
  const had = document.activeElement?.closest?.("#requests > li")?.dataset.id;
  const mark = JSON.stringify([shown, open]);
  if (list.dataset.mark === mark) return;
  list.dataset.mark = mark;
  list.replaceChildren(...shown.map(row));
  if (had !== undefined) [...list.children].find((item) => item.dataset.id === had)?.querySelector("button").focus();
}

function row(record) {
  const { short, level } = reason(record.reason);
  const id = record.request_id, isOpen = open === id;
  const parts = PARTS.filter((part) => record[`${part}_tokens`] > 0).map((part) => {
    const piece = element("i", { class: part });
    piece.style.flexGrow = record[`${part}_tokens`];
    return piece;
  });
  const time = record.ttft_s === undefined || record.ttft_s === null ? "" : ` · ${seconds(record.ttft_s)}`;
  const button = element("button", {
    class: "row", type: "button", "aria-expanded": String(isOpen),
    "aria-label": `Request ${id}. ${whence(record)} ${short}.`,
    onclick: () => { open = isOpen ? null : id; draw(); },
  },
    element("span", { class: "id", title: id }, id),
    element("span", { class: "bar", "aria-hidden": "true" }, ...parts),
    element("span", { class: "n" }, `${number(record.n_tokens)} tok${time}`),
    element("span", { class: `chip ${level}` }, short));
  return element("li", { "data-id": id }, button, isOpen ? explained(record) : null);
}

function explained(record) {
  const { sentence } = reason(record.reason);
  const names = { device: "Device", host: "Host", storage: "Storage", missed: "Computed" };
  const figures = PARTS.flatMap((part) => [
    element("dt", {}, element("i", { class: `k ${part}` }), names[part]),
    element("dd", {}, `${number(record[`${part}_tokens`])} tokens, ${share(record[`${part}_tokens`], record.n_tokens)}`),
  ]);
  for (const [field, label] of [["ttft_s", "First token after"], ["total_s", "Done after"]]) {
    if (record[field] !== undefined && record[field] !== null) figures.push(element("dt", {}, label), element("dd", {}, seconds(record[field])));
  }
  return element("div", { class: "why" },
    element("p", {}, element("strong", { class: "id" }, record.request_id)),
    element("p", {}, whence(record)),
    element("p", {}, sentence),
    record.detail ? element("p", {}, `In detail: ${record.detail}.`) : null,
    element("dl", {}, ...figures));
}
