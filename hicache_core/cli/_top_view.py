"""The view of ``hicache top``: a cache at one moment, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hicache_core.cli._status_view import alarms_of, nbytes_text, transfers_table
from hicache_core.observe.snapshot import BackendStatus, CacheSnapshot, PoolStatus
from hicache_core.observe.windows import Observation

STYLES = {"device": "blue", "host": "green", "storage": "yellow", "computed": "bright_black"}
BREAKERS = {"closed": "green", "half_open": "yellow", "open": "bold red"}
BAR_CELLS = 20  # so that a line has room in 80 columns
MAX_REQUESTS = 10


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates per second, over the last ``SPAN`` samples at most.

    Attributes:
        stored_nbytes, loaded_nbytes: bytes per second to and from storage.
        cached_tokens, computed_tokens: prompt tokens per second.
    """

    SPAN: ClassVar[int] = 10
    stored_nbytes: float
    loaded_nbytes: float
    cached_tokens: float
    computed_tokens: float


@dataclass(frozen=True, slots=True)
class Moment:
    """All that ``hicache top`` shows.

    Attributes:
        url: address of the cache, without secrets.
        seen: its status.
        rates: None until there are two samples.
        requests: the latest requests, newest first.
        engine: the answer of its engine; empty if there is no engine.
        last_sample: number of the newest sample of its history; 0 if there is none.
    """

    url: str
    seen: Observation
    rates: Rates | None
    requests: Sequence[Mapping[str, Any]]
    engine: Mapping[str, Any]
    last_sample: int


def rates_of(samples: Sequence[Mapping[str, Any]]) -> Rates | None:
    """The rates between the newest sample and the one ``Rates.SPAN`` samples before it."""
    late = samples[-Rates.SPAN - 1 :]
    if len(late) < 2:
        return None
    first, last = late[0], late[-1]
    span_s: float = max(1e-3, last["at_s"] - first["at_s"])

    def rate(new: float, old: float) -> float:
        return max(0.0, new - old) / span_s

    hits = [sum(sample["hit_tokens"].values()) for sample in (last, first)]
    return Rates(
        rate(last["stored_nbytes"], first["stored_nbytes"]),
        rate(last["loaded_nbytes"], first["loaded_nbytes"]),
        rate(*hits),
        rate(last["missed_tokens"], first["missed_tokens"]),
    )


def top_view(moment: Moment) -> RenderableType:
    """All parts; alarms come first, since a low window cuts off the end."""
    seen = moment.seen
    alarms = [Text(f"ALARM  {alarm}", style="bold red") for alarm in alarms_of(seen)]
    parts: list[RenderableType] = [_head(moment), *alarms, _tiers(seen.snapshot)]
    if seen.snapshot.backends:
        parts += [_stores(seen.snapshot.backends), Text(_queue(seen.snapshot))]
    if seen.snapshot.transfers:
        parts.append(transfers_table(seen.snapshot))
    return Group(*parts, _requests(moment.requests))


def _head(moment: Moment) -> Text:
    seen, engine = moment.seen, moment.engine
    hits = sum(seen.snapshot.hit_tokens.values())
    prompt = hits + seen.snapshot.counters.get("missed_tokens", 0)
    rate = f"{hits / prompt:.1%} of {prompt:,} tokens" if prompt else "no tokens yet"
    lines = [
        f"HiCache  {moment.url}",
        f"hit rate  {seen.hit_rate:.1%} in the last minute, {rate} since the start",
    ]
    if moment.rates is not None:
        rates = moment.rates
        lines.append(
            f"per second  {rates.cached_tokens:,.0f} tokens cached, {rates.computed_tokens:,.0f} "
            f"computed, {nbytes_text(int(rates.loaded_nbytes))} from storage, "
            f"{nbytes_text(int(rates.stored_nbytes))} to it"
        )
    if "running" in engine:
        lines.append(f"requests  {engine['running']} running, {engine.get('waiting', 0)} waiting")
    return Text("\n".join(lines) + "\n")


def _tiers(snapshot: CacheSnapshot) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for tier, pool in (("device", snapshot.device), ("host", snapshot.host)):
        if pool is not None:
            hits = snapshot.hit_tokens.get(tier, 0)
            table.add_row(
                tier, _bar(tier, pool), _filled(pool, snapshot.page_size), f"{hits:,} hit tokens"
            )
    if snapshot.backends:
        amount = f"{nbytes_text(snapshot.stored_nbytes)} stored"
        hits = snapshot.hit_tokens.get("storage", 0)
        table.add_row("storage", "", amount, f"{hits:,} hit tokens")
    return table


def _bar(tier: str, pool: PoolStatus) -> Text:
    """A bar of the used pages; the shaded part can be evicted."""
    used = round(BAR_CELLS * pool.used_pages / max(1, pool.n_pages))
    evictable = round(BAR_CELLS * (pool.evictable_pages or 0) / max(1, pool.n_pages))
    held = max(0, used - evictable)
    return Text.assemble(
        ("█" * held, STYLES[tier]),
        ("▒" * (used - held), STYLES[tier]),
        ("·" * (BAR_CELLS - used), "bright_black"),
    )


def _filled(pool: PoolStatus, page_size: int) -> str:
    share = pool.used_pages / max(1, pool.n_pages)
    return f"{share:.0%} of {pool.n_pages * page_size:,} tokens"


def _stores(backends: Sequence[BackendStatus]) -> Table:
    table = _table("STORE", "BREAKER", "LOADED", "STORED", "GET P50", "GET P99", "ERRORS")
    for backend in backends:
        gets = [one.latency_s for one in backend.operations if one.op == "get"]
        bounds = [gets[0].quantile(share) if gets else None for share in (0.5, 0.99)]
        errors = sum(sum(one.errors.values()) for one in backend.operations)
        table.add_row(
            backend.name,
            Text(backend.breaker or "none", style=BREAKERS.get(backend.breaker, "")),
            nbytes_text(backend.loaded_nbytes),
            nbytes_text(backend.stored_nbytes),
            *("–" if bound is None else f"≤ {bound * 1000:g} ms" for bound in bounds),
            f"{errors:,}",
        )
    return table


def _queue(snapshot: CacheSnapshot) -> str:
    waiting = ", ".join(f"{name} {n}" for name, n in snapshot.queue_depths.items() if n)
    moving = ", ".join(f"{way} {nbytes_text(n)}" for way, n in snapshot.bytes_in_flight.items())
    return f"queue  {waiting or 'empty'}; in flight: {moving or 'nothing'}\n"


def _requests(requests: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The slowest requests if they were timed; otherwise those with the most computed tokens."""
    if not requests:
        return Text("no requests yet")
    timed = any(request.get("ttft_s") is not None for request in requests)
    key = "ttft_s" if timed else "missed_tokens"
    slowest = sorted(requests, key=lambda one: -(one.get(key) or 0))[:MAX_REQUESTS]
    first = "FIRST TOKEN" if timed else ""
    title = "SLOWEST REQUESTS" if timed else "MOST COMPUTED REQUESTS"
    table = _table(title, "TOKENS", "DEVICE", "HOST", "STORAGE", "COMPUTED", first, "WHY")
    for one in slowest:
        ttft_s = one.get("ttft_s")
        counts = ("n", "device", "host", "storage", "missed")
        table.add_row(
            str(one["request_id"])[:40],
            *(f"{one[f'{name}_tokens']:,}" for name in counts),
            "" if ttft_s is None else f"{ttft_s * 1000:,.0f} ms",
            str(one["reason"]).replace("_", " "),
        )
    return table


def _table(*headers: str) -> Table:
    """A table that shortens its first and last column in a narrow window, but never a number."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for n, header in enumerate(headers):
        gives_way = n == 0 or header == "WHY"
        table.add_column(
            header,
            justify="left" if n == 0 else "right",
            no_wrap=not gives_way,
            overflow="ellipsis" if gives_way else "fold",
        )
    return table
