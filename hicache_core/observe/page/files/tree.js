// The prefix tree as a picture: each node is drawn below its parent, as wide as its subtree.

import { at, drawn, element, say } from "./dom.js";
import { ago, compact, number } from "./words.js";

const ROW = 26, MAX_ROWS = 12, MIN_WIDTH = 3;

let nodes = [], children = new Map(), by = "tokens", focus = -1, answer = null, lastWidth = 0;

export function showTree(given) {
  answer = given;
  const picture = given?.picture ?? { nodes: [], n_nodes: 0, is_partial: false };
  const place = focus >= 0 ? path(focus).map(identity) : [];
  nodes = picture.nodes;
  children = new Map([[-1, []]]);
  nodes.forEach((node, index) => {
    children.set(index, []);
    children.get(node.parent)?.push(index);
  });
  focus = refind(place);
  draw();
}

export function openTree() {
  for (const input of document.querySelectorAll("input[name=by]")) {
    input.addEventListener("change", () => { by = input.value; draw(); });
  }
  new ResizeObserver(() => { if (at("tree").clientWidth !== lastWidth) draw(); }).observe(at("tree"));
}

// Nodes have no lasting names; one is found again by where it begins, and by its place among its like.
function identity(index) {
  const { depth_tokens, parent } = nodes[index];
  return `${depth_tokens}/${children.get(parent).indexOf(index)}`;
}

function refind(place) {
  let here = -1;
  for (const wanted of place) {
    const next = children.get(here).find((child) => identity(child) === wanted);
    if (next === undefined) break;
    here = next;
  }
  return here;
}

function path(index) {
  const found = [];
  for (let here = index; here >= 0; here = nodes[here].parent) found.unshift(here);
  return found;
}

function weight(index) {
  const node = nodes[index];
  const below = children.get(index).reduce((sum, child) => sum + weight(child), 0);
  return by === "tokens" ? node.tokens + node.tokens_below : Math.max(node.hits, below, 1);
}

function name(index) {
  const node = nodes[index];
  return node.parent < 0 ? `namespace ${children.get(-1).indexOf(index) + 1}` : `${compact(node.tokens)} tokens`;
}

function words(index) {
  const node = nodes[index];
  if (node.parent < 0) return `Namespace ${children.get(-1).indexOf(index) + 1}: ${number(node.tokens_below)} tokens cached.`;
  const tiers = node.tiers.length ? `on ${node.tiers.join(", ")}` : "being loaded";
  const units = Object.entries(node.units).map(([group, where]) => `; ${group} on ${where.join(", ")}`).join("");
  const hidden = node.hidden ? `, ${number(node.hidden)} smaller nodes not drawn` : "";
  return `Tokens ${number(node.depth_tokens)} to ${number(node.depth_tokens + node.tokens)} of a prefix: ${tiers}${units}; ` +
    `${number(node.hits)} hits; ${number(node.tokens_below)} tokens below${hidden}${node.locked ? "; in use now" : ""}.`;
}

function draw() {
  drawCrumbs();
  const box = at("tree");
  const had = document.activeElement?.closest?.("#tree g")?.dataset.node;
  lastWidth = box.clientWidth;
  if (!nodes.length) {
    box.replaceChildren();
    const waits = answer && answer.picture === null;
    say(at("tree-says"), waits ? "The engine is idle. The tree is drawn at its next step." : "The tree is empty.");
    drawTable();
    return;
  }
  const groups = [], rows = [0];
  const tops = focus < 0 ? children.get(-1) : [focus];
  layout(tops, 0, lastWidth, 0, groups, rows);
  const height = (rows[0] + 1) * ROW;
  box.replaceChildren(drawn("svg", { height, viewBox: `0 0 ${lastWidth} ${height}`, role: "group", "aria-label": "Prefix tree; Enter zooms in, Escape zooms out" }, ...groups));
  const focused = had === undefined ? null : box.querySelector(`g[data-node="${had}"]`);
  if (focused) focused.focus();
  else say(at("tree-says"), summary());
  drawTable();
}

function summary() {
  const { n_nodes, is_partial } = answer.picture;
  const shown = nodes.filter((node) => node.parent >= 0).length;
  const part = shown < n_nodes ? `The ${number(shown)} largest and most used of ${number(n_nodes)} nodes` : `All ${number(n_nodes)} nodes`;
  const partial = is_partial ? "; sums are lower bounds, since not all nodes were visited" : "";
  return `${part}${partial}. Paler means fewer hits. Select a node to zoom in. As of ${ago(answer.age_s)}.`;
}

function layout(indices, x, width, row, groups, rows) {
  if (row >= MAX_ROWS || !indices.length) return;
  const whole = indices.reduce((sum, index) => sum + weight(index), 0);
  const { parent } = nodes[indices[0]];
  const all = row === 0 ? whole : Math.max(whole, by === "tokens" ? nodes[parent].tokens_below : weight(parent));
  let left = x;
  for (const index of [...indices].sort((a, b) => weight(b) - weight(a))) {
    const w = width * weight(index) / Math.max(1, all);
    if (w >= MIN_WIDTH) {
      rows[0] = Math.max(rows[0], row);
      groups.push(box(index, left, row * ROW, w));
      layout(children.get(index), left, w, row + 1, groups, rows);
    }
    left += w;
  }
}

function box(index, x, y, width) {
  const node = nodes[index];
  const kind = node.parent < 0 ? "root" : node.tiers[0] ?? "root";
  const most = Math.max(1, ...nodes.map((one) => one.hits));
  const strength = 45 + 55 * Math.log1p(node.hits) / Math.log1p(most);
  const label = name(index), fits = Math.floor((width - 10) / 7);
  const text = fits >= 3 ? drawn("text", { x: x + 6, y: y + 17 }, label.length <= fits ? label : `${label.slice(0, fits - 1)}…`) : null;
  const enter = () => zoom(focus === index ? node.parent : index);
  const face = drawn("rect", { class: "face", x, y, width, height: ROW - 1, rx: 3 });
  if (kind !== "root") face.style.fill = `color-mix(in srgb, var(--${kind}) ${strength}%, #fff)`;
  return drawn("g", {
    class: kind, tabindex: 0, role: "button", "data-node": index, "aria-label": words(index),
    onclick: enter,
    onfocus: () => say(at("tree-says"), words(index)),
    onpointerenter: () => say(at("tree-says"), words(index)),
    onkeydown: (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); enter(); }
      if (event.key === "Escape" && focus >= 0) zoom(nodes[focus].parent);
    },
  }, face, text);
}

function zoom(index) {
  focus = index;
  draw();
  at("tree").querySelector("g")?.focus(); // the node itself, or the first of all
}

function drawCrumbs() {
  const steps = [[-1, "all"], ...path(focus).map((index) => [index, name(index)])];
  at("crumbs").replaceChildren(...steps.map(([index, text]) => element("button", {
    type: "button", "aria-current": index === focus ? "true" : null, onclick: () => zoom(index),
  }, text)));
}

function drawTable() {
  const top = nodes.map((node, index) => [node, index]).filter(([node]) => node.parent >= 0)
    .sort(([a], [b]) => (by === "tokens" ? b.tokens + b.tokens_below - a.tokens - a.tokens_below : b.hits - a.hits)).slice(0, 20);
  const cells = (kind, ...texts) => element("tr", {}, ...texts.map((text) => element(kind, kind === "th" ? { scope: "col" } : {}, text)));
  const rows = top.map(([node]) => cells("td",
    `${number(node.depth_tokens)}–${number(node.depth_tokens + node.tokens)}`,
    number(node.tokens_below), number(node.hits), node.tiers.join(", ") || "being loaded"));
  at("tree-table").replaceChildren(element("table", {},
    element("thead", {}, cells("th", "Tokens", "Below", "Hits", "Tiers")), element("tbody", {}, ...rows)));
  at("tree-details").hidden = !top.length;
}
