// Charts over time: stacked areas below an optional limit, with a reading under the pointer.

import { drawn, element, say } from "./dom.js";
import { ago, seconds } from "./words.js";

const HEIGHT = 130, LEFT = 52, BOTTOM = 18, TOP = 6, DEFAULT_WIDTH = 340;

function nice(value) {
  if (value <= 0) return 2;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value);
}

// series: [{ name, kind, faint, line, values }]; areas are stacked, lines are not.
export class Chart {
  constructor(title, format) {
    this.format = format;
    this.title = title;
    this.now = element("p", { class: "now" });
    this.svg = drawn("svg", { role: "img" });
    this.key = element("p", { class: "key" });
    this.node = element("div", { class: "chart" },
      element("div", { class: "title" }, element("h3", {}, title), this.now), this.svg, this.key);
    this.pointed = null;
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => { this.pointed = null; this.#read(); });
  }

  show(times, series, { limit = null, says }) {
    this.times = times;
    this.series = series;
    this.says = says;
    this.width = this.node.clientWidth || DEFAULT_WIDTH; // a unit is a pixel, so text keeps its size
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    const stacked = times.map((_, at) => series.filter((one) => !one.line).reduce((sum, one) => sum + (one.values[at] ?? 0), 0));
    const lines = series.filter((one) => one.line).flatMap((one) => one.values.filter((value) => value !== null));
    this.top = limit ?? nice(Math.max(0, ...stacked, ...lines));
    this.first = Math.min(times[0] ?? 0, (times.at(-1) ?? 0) - 60);
    const shapes = [...this.#grid(), ...this.#areas(), ...this.#lines()];
    this.cross = drawn("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    this.svg.replaceChildren(...shapes, this.cross);
    this.svg.setAttribute("aria-label", `${this.title}: ${says}`);
    this.key.replaceChildren(...series.map((one) => element("span", {},
      element("i", { class: `k ${one.kind}${one.faint ? " faint" : ""}${one.line ? " line" : ""}` }), one.name)));
    this.#read();
  }

  #x(time) {
    const last = this.times.at(-1) ?? 1;
    return LEFT + (this.width - LEFT - 4) * (time - this.first) / Math.max(1, last - this.first);
  }

  #y(value) {
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * Math.min(1, value / this.top);
  }

  #grid() {
    const rows = [0, 0.5, 1].flatMap((part) => {
      const y = this.#y(part * this.top);
      return [
        drawn("line", { class: "grid", x1: LEFT, x2: this.width - 4, y1: y, y2: y }),
        drawn("text", { class: "axis", x: LEFT - 6, y: y + 4, "text-anchor": "end" }, this.format(part * this.top)),
      ];
    });
    const span = (this.times.at(-1) ?? 0) - this.first;
    return [...rows,
      drawn("text", { class: "axis", x: LEFT, y: HEIGHT - 3 }, `${seconds(Math.round(span))} ago`),
      drawn("text", { class: "axis", x: this.width - 4, y: HEIGHT - 3, "text-anchor": "end" }, "now")];
  }

  #areas() {
    const base = this.times.map(() => 0);
    return this.series.filter((one) => !one.line).map((one) => {
      const lower = this.times.map((time, at) => `${this.#x(time)},${this.#y(base[at])}`);
      one.values.forEach((value, at) => { base[at] += value ?? 0; });
      const upper = this.times.map((time, at) => `${this.#x(time)},${this.#y(base[at])}`);
      return drawn("polygon", {
        points: [...upper, ...lower.reverse()].join(" "),
        fill: `var(--${one.kind})`, "fill-opacity": one.faint ? 0.38 : 0.9,
      });
    });
  }

  #lines() {
    return this.series.filter((one) => one.line).flatMap((one) => {
      const runs = [[]];
      one.values.forEach((value, at) => {
        if (value === null) runs.push([]);
        else runs.at(-1).push([this.#x(this.times[at]), this.#y(value)]);
      });
      const stroke = { stroke: `var(--${one.kind})`, "stroke-opacity": one.faint ? 0.5 : 1 };
      return runs.filter((run) => run.length).map((run) => run.length === 1
        ? drawn("circle", { cx: run[0][0], cy: run[0][1], r: 2, fill: `var(--${one.kind})`, "fill-opacity": one.faint ? 0.5 : 1 })
        : drawn("polyline", { points: run.map((point) => point.join(",")).join(" "), fill: "none", "stroke-width": 2, ...stroke }));
    });
  }

  #point(event) {
    if (!this.times?.length) return;
    const box = this.svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * this.width / box.width;
    const distance = (time) => Math.abs(this.#x(time) - x);
    const nearest = this.times.reduce((best, time) => (distance(time) < distance(best) ? time : best));
    this.pointed = nearest;
    this.#read();
  }

  #read() {
    const at = this.pointed === null ? -1 : this.times.indexOf(this.pointed);
    if (at < 0) {
      this.cross?.setAttribute("visibility", "hidden");
      say(this.now, this.says ?? "");
      return;
    }
    const x = this.#x(this.pointed);
    for (const name of ["x1", "x2"]) this.cross.setAttribute(name, x);
    this.cross.setAttribute("visibility", "visible");
    const values = this.series.map((one) => `${one.name} ${one.values[at] === null ? "–" : this.format(one.values[at])}`);
    say(this.now, `${ago(this.times.at(-1) - this.pointed)}: ${values.join(", ")}`);
  }
}
