// Text for people: numbers with units, and sentences for the reasons of a miss.

export const TIERS = ["device", "host", "storage"];

const count = new Intl.NumberFormat("en");

export function number(n) {
  return count.format(Math.round(n));
}

export function compact(n) {
  if (n < 10_000) return number(n);
  const units = [[1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const [size, unit] = units.find(([size]) => n >= size);
  const value = n / size;
  return `${value >= 100 ? Math.round(value) : value.toFixed(1)} ${unit}`;
}

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (n >= 1024 && at < units.length - 1) { n /= 1024; at += 1; }
  return at ? `${n >= 100 ? Math.round(n) : n.toFixed(1)} ${units[at]}` : `${Math.round(n)} B`;
}

export function share(part, all) {
  return all > 0 ? `${(100 * part / all).toFixed(part === all || part === 0 ? 0 : 1)} %` : "–";
}

export function seconds(s) {
  if (s === null || s === undefined) return "–";
  if (s < 0.001) return `${Math.round(s * 1e6)} µs`;
  if (s < 1) return `${+(s * 1000).toPrecision(3)} ms`;
  if (s < 120) return `${+s.toPrecision(3)} s`;
  return s < 7200 ? `${Math.round(s / 60)} min` : `${+(s / 3600).toPrecision(3)} h`;
}

export function ago(s) {
  return s < 1 ? "now" : `${seconds(Math.round(s))} ago`;
}

// The label of a chip, its severity, and the sentence that explains it.
const REASONS = {
  none: ["all found", "good", "Only the tail after the last whole page was missing; that part is always computed."],
  never_seen: ["never seen", "", "As far as this process remembers, no request has computed this prefix before."],
  too_short: ["shorter than a page", "", "The prompt is shorter than a page, and only whole pages are cached."],
  new_part: ["new part", "", "The prefix was found. As far as this process remembers, no request has computed what follows it."],
  evicted: ["evicted", "warn", "The prefix was cached here and has been evicted since."],
  not_durable: ["not durable", "warn", "The prefix was evicted before it was stored."],
  below_threshold: ["below threshold", "", "Too few tokens were missing, or found in storage, to be worth loading."],
  deadline: ["storage too slow", "warn", "Storage had more, but did not deliver it before the deadline."],
  declined: ["not worth loading", "", "Loading was expected to take longer than computing."],
  breaker_open: ["breaker open", "bad", "The store failed before and is not used for a while."],
  storage_error: ["storage error", "bad", "The call to the store failed."],
  corrupt: ["corrupt", "bad", "The stored pages failed verification and were not used."],
  vanished: ["vanished", "warn", "The store reported the pages as present but could not deliver them."],
  no_room: ["no host room", "warn", "There was no free host page to load into."],
  cut_by_group: ["cut by a group", "warn", "The full pages reach further, but a window or a state lacks what it needs to go on there."],
  other_namespace: ["other namespace", "", "The same tokens are cached for another tenant, key or adapter, and this request may not use them."],
};

export function reason(name) {
  const [short, level, sentence] = REASONS[name] ?? [String(name).replaceAll("_", " "), "", ""];
  return { short, level, sentence };
}

export function whence(record) {
  const parts = [
    [record.device_tokens, "were on the device"],
    [record.host_tokens, "were on the host"],
    [record.storage_tokens, "came from storage"],
    [record.missed_tokens, "were computed"],
  ].filter(([n]) => n > 0).map(([n, what]) => `${number(n)} ${what}`);
  const last = parts.pop() ?? "none were needed";
  const list = parts.length ? `${parts.join(", ")} and ${last}` : last;
  return `Of ${number(record.n_tokens)} prompt tokens, ${list}.`;
}

export const BREAKERS = {
  closed: ["closed: in use", "good"],
  half_open: ["half open: being tested", "warn"],
  open: ["open: not in use", "bad"],
  "": ["no breaker", ""],
};

export function quantile(histogram, wanted) {
  const n = histogram.counts.reduce((sum, count) => sum + count, 0);
  if (!n) return null;
  let below = 0;
  for (const [at, bound] of histogram.bounds.entries()) {
    below += histogram.counts[at];
    if (below >= wanted * n) return bound;
  }
  return histogram.bounds.at(-1);
}

export function total(histogram) {
  return histogram.counts.reduce((sum, count) => sum + count, 0);
}

export function bound(histogram, wanted) {
  const found = quantile(histogram, wanted);
  return found === null ? "–" : `≤ ${seconds(found)}`;
}

export function counts(byWord) {
  return Object.entries(byWord).filter(([, n]) => n).map(([word, n]) => `${word} ${number(n)}`).join(", ");
}
