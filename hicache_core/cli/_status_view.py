"""The view of ``hicache status``: one observation on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hicache_core.observe.snapshot import BackendStatus, CacheSnapshot, OperationStatus, PoolStatus
from hicache_core.observe.windows import Observation

_BREAKERS = {"closed": "green", "half_open": "yellow", "open": "bold red"}
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


def view(seen: Observation) -> RenderableType:
    """All tables; alarms come last, next to the prompt of the shell."""
    snapshot = seen.snapshot
    parts: list[RenderableType] = [_tiers(seen), Text(_hits(seen))]
    if snapshot.backends:
        parts += [_storage(snapshot), _operations(snapshot), Text(_queues(snapshot))]
    if snapshot.transfers:
        parts.append(transfers_table(snapshot))
    alarms = list(alarms_of(seen))
    parts += [Text(f"ALARM  {alarm}", style="bold red") for alarm in alarms]
    return Group(*parts, *([] if alarms else [Text("no alarms", style="green")]))


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


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for n, header in enumerate(headers):
        table.add_column(header, justify="left" if n == 0 else "right", no_wrap=True)
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


def _hits(seen: Observation) -> str:
    hits = sum(seen.snapshot.hit_tokens.values())
    asked = hits + seen.snapshot.counters.get("missed_tokens", 0)
    since_start = f"{hits / asked:.1%} of {asked:,} tokens" if asked else "no tokens yet"
    return f"hit rate: {seen.hit_rate:.1%} in the last minute, {since_start} since the start\n"


def _storage(snapshot: CacheSnapshot) -> Table:
    table = _table(
        "storage", "BACKEND", "BREAKER", "STORED", "LOADED", "ERRORS", "RETRIES", "NOT ASKED"
    )
    for backend in snapshot.backends:
        table.add_row(
            backend.name,
            Text(backend.breaker or "none", style=_BREAKERS.get(backend.breaker, "")),
            nbytes_text(backend.stored_nbytes),
            nbytes_text(backend.loaded_nbytes),
            f"{_n_errors(backend):,}",
            f"{backend.retries:,}",
            f"{backend.short_circuits + backend.negative_hits:,}",
        )
    return table


def _operations(snapshot: CacheSnapshot) -> Table:
    table = _table("operations", "BACKEND", "OPERATION", "CALLS", "P50", "P99", "ERRORS")
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


def transfers_table(snapshot: CacheSnapshot) -> Table:
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
