"""The views of ``hicache status`` and ``hicache top``: a running cache on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hicache_core.observe.snapshot import (
    BackendStatus,
    CacheSnapshot,
    GroupStatus,
    OperationStatus,
    PoolStatus,
)
from hicache_core.observe.windows import Observation

_BREAKERS = {"closed": "green", "half_open": "yellow", "open": "bold red"}
_STYLES = {"device": "blue", "host": "green"}
_BAR_CELLS = 20  # so that a line has room in 80 columns
_MAX_REQUESTS = 10
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def console(*, least_width: int = 0) -> Console:
    """Standard output; 160 columns if it is not a terminal, so that a file holds whole lines.

    Args:
        least_width: columns; a narrower terminal wraps lines instead of cutting numbers off.
    """
    made = Console(markup=False, highlight=False)
    if made.is_terminal and made.width >= least_width:
        return made
    width = least_width if made.is_terminal else 160
    return Console(markup=False, highlight=False, width=width)


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


def status_view(seen: Observation) -> RenderableType:
    """The cache in numbers; alarms come last, next to the prompt of the shell."""
    alarms = _alarms(seen) or [Text("no alarms", style="green")]
    tiers = [_tiers(seen), *_groups(seen.snapshot), Text(_hits(seen) + "\n")]
    return Group(*tiers, *_storage(seen.snapshot), *alarms)


def top_view(moment: Moment) -> RenderableType:
    """Rates and requests as well; alarms come first, since a low window cuts off the end."""
    seen = moment.seen
    parts: list[RenderableType] = [_head(moment), *_alarms(seen), _bars(seen.snapshot)]
    parts += _groups(seen.snapshot)
    return Group(*parts, *_storage(seen.snapshot), _requests(moment.requests))


def _alarms(seen: Observation) -> list[RenderableType]:
    return [Text(f"ALARM  {alarm}", style="bold red") for alarm in alarms_of(seen)]


def _storage(snapshot: CacheSnapshot) -> Iterator[RenderableType]:
    """The stores and what goes between nodes; nothing of what the cache does not have."""
    if snapshot.backends:
        yield from (_stores(snapshot), _operations(snapshot), Text(_queues(snapshot)))
    if snapshot.transfers:
        yield _transfers(snapshot)


def alarms_of(seen: Observation) -> Iterator[str]:
    """What an operator should look at, one line for each alarm."""
    snapshot = seen.snapshot
    if seen.write_only:
        yield "storage is only written to: much is stored, nothing is loaded (see hicache why)"
    for backend in snapshot.backends:
        if backend.breaker in ("open", "half_open"):
            yield _breaker_alarm(backend)
    rejected = _words(snapshot.rejected_pages)
    if rejected:
        yield f"refused objects in storage: {rejected}"
    if snapshot.quarantined_pages:
        yield f"{snapshot.quarantined_pages} host pages are held by stuck storage jobs"
    if snapshot.events is not None and snapshot.events.dropped_runs:
        yield f"{snapshot.events.dropped_runs} KV events were dropped; subscribers start over"


def _breaker_alarm(backend: BackendStatus) -> str:
    state = backend.breaker.replace("_", " ")
    probe = f", next probe in {backend.next_probe_s:.1f} s" if backend.next_probe_s else ""
    reason = f": {backend.last_error}" if backend.last_error else ""
    since_s = backend.breaker_since_s
    return f"{backend.name}: the breaker is {state} for {since_s:.0f} s{probe}{reason}"


def _table(title: str, *headers: str, texts: Sequence[str] = ()) -> Table:
    """A table that shortens its first column and ``texts`` in a narrow window, never a number."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True
    )
    for n, header in enumerate(headers):
        gives_way = n == 0 or header in texts
        table.add_column(
            header,
            justify="left" if n == 0 else "right",
            no_wrap=not gives_way,
            overflow="ellipsis" if gives_way else "fold",
        )
    return table


def _tiers(seen: Observation) -> Table:
    snapshot = seen.snapshot
    table = _table(
        "tiers",
        "TIER",
        "PAGES",
        "FREE",
        "EVICTABLE",
        "LOCKED",
        "IN FLIGHT",
        "HIT TOKENS",
        "EVICTED",
    )
    for tier, pool in (("device", snapshot.device), ("host", snapshot.host), ("storage", None)):
        if pool is None and (tier == "host" or not snapshot.backends):
            continue
        evicted = sum(item.n_pages for item in snapshot.evicted_pages if item.tier == tier)
        hits = snapshot.hit_tokens.get(tier, 0)
        table.add_row(tier, *_pages(pool), f"{hits:,}", f"{evicted:,}")
    return table


def _pages(pool: PoolStatus | None) -> Iterator[str]:
    if pool is None:
        yield from ("",) * 5
        return
    numbers = (pool.free_pages, pool.evictable_pages, pool.locked_pages, pool.in_flight_pages)
    yield from ("–" if n is None else f"{n:,}" for n in (pool.n_pages, *numbers))


def _groups(snapshot: CacheSnapshot) -> Iterator[RenderableType]:
    """The units of windows and states, one row for each group and tier; nothing without groups."""
    if not snapshot.groups:
        return
    table = _table(
        "groups of layers", "GROUP", "TIER", "UNITS", "FREE", "CACHED", "EVICTED", "CUT MATCHES"
    )
    for group in snapshot.groups:
        for tier, pool in (("device", group.device), ("host", group.host)):
            if pool is None:
                continue
            evicted = sum(item.n_pages for item in group.evicted_units if item.tier == tier)
            numbers = (pool.n_pages, pool.free_pages, pool.cached_pages or 0, evicted)
            first = tier == "device"
            table.add_row(
                _group_words(group) if first else "",
                tier,
                *(f"{n:,}" for n in numbers),
                f"{group.cut_matches:,}" if first else "",
            )
    yield table


def _group_words(group: GroupStatus) -> str:
    return f"{group.name} (window {group.window:,})" if group.window else f"{group.name} (state)"


def _hits(seen: Observation) -> str:
    hits = sum(seen.snapshot.hit_tokens.values())
    asked = hits + seen.snapshot.counters.get("missed_tokens", 0)
    since_start = f"{hits / asked:.1%} of {asked:,} tokens" if asked else "no tokens yet"
    return f"hit rate: {seen.hit_rate:.1%} in the last minute, {since_start} since the start"


def _stores(snapshot: CacheSnapshot) -> Table:
    table = _table(
        "storage", "BACKEND", "BREAKER", "STORED", "LOADED", "ERRORS", "RETRIES", "NOT ASKED"
    )
    for backend in snapshot.backends:
        table.add_row(
            backend.name,
            Text(backend.breaker or "none", style=_BREAKERS.get(backend.breaker, "")),
            "read-only" if backend.read_only else nbytes_text(backend.stored_nbytes),
            nbytes_text(backend.loaded_nbytes),
            f"{_n_errors(backend):,}",
            f"{backend.retries:,}",
            f"{backend.short_circuits + backend.negative_hits:,}",
        )
    return table


def _operations(snapshot: CacheSnapshot) -> Table:
    headers = ("BACKEND", "OPERATION", "CALLS", "P50", "P99", "ERRORS")
    table = _table("operations", *headers, texts=["ERRORS"])
    for backend in snapshot.backends:
        for operation in backend.operations:
            table.add_row(backend.name, operation.op, *_calls(operation))
    return table


def _calls(operation: OperationStatus) -> Iterator[str]:
    yield f"{operation.latency_s.n:,}"
    for share in (0.5, 0.99):
        bound_s = operation.latency_s.quantile(share)
        yield "" if bound_s is None else f"≤ {bound_s * 1000:g} ms"
    yield _words(operation.errors)


def _transfers(snapshot: CacheSnapshot) -> Table:
    """What moved between prefill and decode nodes, one row for each transfer backend."""
    table = _table(
        "transfers",
        "BACKEND",
        "SENT",
        "RECEIVED",
        "ENDED",
        "IN FLIGHT",
        "CONNECTIONS",
        "P50",
        "P99",
        texts=["ENDED"],
    )
    for item in snapshot.transfers:
        bounds_s = [item.seconds.quantile(share) for share in (0.5, 0.99)]
        table.add_row(
            item.backend,
            *(nbytes_text(item.nbytes.get(way, 0)) for way in ("sent", "received")),
            _words(item.outcomes) or "none",
            f"{sum(item.in_flight.values()):,}",
            "" if item.connections is None else f"{item.connections:,}",
            *("" if bound_s is None else f"≤ {bound_s:g} s" for bound_s in bounds_s),
        )
    return table


def _queues(snapshot: CacheSnapshot) -> str:
    in_flight = {kind: nbytes_text(n) for kind, n in snapshot.bytes_in_flight.items() if n}
    lines = {
        "queued": _words(snapshot.queue_depths),
        "jobs in flight": _words(snapshot.jobs_in_flight),
        "bytes in flight": ", ".join(f"{kind} {text}" for kind, text in in_flight.items()),
        "overdue": f"{snapshot.overdue_jobs}" if snapshot.overdue_jobs else "",
        "admission": _words(snapshot.admission),
    }
    return "".join(f"{name}: {text or 'none'}\n" for name, text in lines.items())


def _head(moment: Moment) -> Text:
    seen, engine = moment.seen, moment.engine
    lines = [f"HiCache  {moment.url}", _hits(seen)]
    if moment.rates is not None:
        rates = moment.rates
        lines.append(
            f"per second: {rates.cached_tokens:,.0f} tokens cached, {rates.computed_tokens:,.0f} "
            f"computed, {nbytes_text(int(rates.loaded_nbytes))} from storage, "
            f"{nbytes_text(int(rates.stored_nbytes))} to it"
        )
    if "running" in engine:
        lines.append(f"requests: {engine['running']} running, {engine.get('waiting', 0)} waiting")
    return Text("\n".join(lines) + "\n")


def _bars(snapshot: CacheSnapshot) -> Table:
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
    used = round(_BAR_CELLS * pool.used_pages / max(1, pool.n_pages))
    evictable = round(_BAR_CELLS * (pool.evictable_pages or 0) / max(1, pool.n_pages))
    held = max(0, used - evictable)
    return Text.assemble(
        ("█" * held, _STYLES[tier]),
        ("▒" * (used - held), _STYLES[tier]),
        ("·" * (_BAR_CELLS - used), "bright_black"),
    )


def _filled(pool: PoolStatus, page_size: int) -> str:
    share = pool.used_pages / max(1, pool.n_pages)
    return f"{share:.0%} of {pool.n_pages * page_size:,} tokens"


def _requests(requests: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The slowest requests if they were timed; otherwise those with the most computed tokens."""
    if not requests:
        return Text("no requests yet")
    timed = any(request.get("ttft_s") is not None for request in requests)
    key = "ttft_s" if timed else "missed_tokens"
    slowest = sorted(requests, key=lambda one: -(one.get(key) or 0))[:_MAX_REQUESTS]
    first = "FIRST TOKEN" if timed else ""
    title = "slowest requests" if timed else "requests that computed the most tokens"
    headers = ("REQUEST", "TOKENS", "DEVICE", "HOST", "STORAGE", "COMPUTED", first, "WHY")
    table = _table(title, *headers, texts=["WHY"])
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


def _n_errors(backend: BackendStatus) -> int:
    return sum(sum(operation.errors.values()) for operation in backend.operations)


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items() if n)


def nbytes_text(nbytes: int) -> str:
    """``nbytes`` in the unit that reads best."""
    value, at = float(nbytes), 0
    while value >= 1024 and at < len(_UNITS) - 1:
        value, at = value / 1024, at + 1
    return f"{value:.1f} {_UNITS[at]}" if at else f"{nbytes} B"
