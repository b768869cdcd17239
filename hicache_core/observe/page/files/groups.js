// Groups of layers: the units of windows and states in each tier.

import { at, table } from "./dom.js";
import { bytes, number } from "./words.js";

export function showGroups(groups) {
  at("groups-card").hidden = groups.length === 0;
  const rows = groups.flatMap((one) => ["device", "host"].filter((tier) => one[tier]).map((tier) => {
    const pool = one[tier], isFirst = tier === "device";
    const evicted = one.evicted_units.filter((item) => item.tier === tier).reduce((sum, item) => sum + item.n_pages, 0);
    return [
      isFirst ? one.name : "", isFirst ? (one.window ? `window of ${number(one.window)} tokens` : "state") : "",
      isFirst ? bytes(one.unit_nbytes) : "", tier, number(pool.n_pages), number(pool.free_pages), number(pool.cached_pages),
      number(evicted), isFirst ? number(one.cut_matches) : "",
    ];
  }));
  const heads = ["Group", "Kind", "Unit", "Tier", "Units", "Free", "Cached", "Evicted", "Cut matches"];
  at("groups").replaceChildren(table(heads, rows));
}
