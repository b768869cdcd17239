"""What guards and seals know about the stores, for a snapshot; no store is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from hicache_core.observe.snapshot import BackendStatus, OperationStatus
from hicache_core.storage.guard.backend import GuardedBackend, GuardStatus
from hicache_core.storage.sealed import SealedBackend

REJECTIONS = ("corrupt", "foreign", "wrong_length", "wrong_version")


def backend_statuses(
    guards: Sequence[GuardedBackend], usages: Sequence[Mapping[str, int]] = ()
) -> Sequence[BackendStatus]:
    """The stores behind ``guards``, in order; any thread.

    A second store of the same name is called ``name-2``, and so on.

    Args:
        guards: the guard of each store.
        usages: bytes by namespace of each store, if known.
    """
    found, seen = [], Counter[str]()
    for guard, usage in zip(guards, usages or [{}] * len(guards), strict=True):
        status = guard.status()
        seen[status.backend] += 1
        n = seen[status.backend]
        name = status.backend if n == 1 else f"{status.backend}-{n}"
        made = _backend_status(name, status, usage)
        found.append(replace(made, read_only=guard.context.read_only))
    return found


def _backend_status(name: str, status: GuardStatus, usage: Mapping[str, int]) -> BackendStatus:
    operations = []
    for op, calls in status.operations.items():
        errors = {kind: n for (of, kind), n in status.errors.items() if of == op}
        operations.append(
            OperationStatus(op, calls.latency_s, errors, calls.pages, calls.gib_per_s)
        )
    moved = {op: int(calls.nbytes.total) for op, calls in status.operations.items()}
    return BackendStatus(
        name,
        breaker=status.state.value,
        breaker_since_s=status.since_s,
        breaker_changes=dict(status.state_changes),
        next_probe_s=status.next_probe_s,
        last_error=status.last_error,
        operations=operations,
        retries=status.retries,
        short_circuits=status.short_circuits,
        negative_hits=status.negative_hits,
        stored_nbytes=moved.get("set", 0),
        loaded_nbytes=moved.get("get", 0),
        usage_nbytes=usage,
    )


def rejected_pages(seals: Iterable[SealedBackend]) -> dict[str, int]:
    """Objects that ``seals`` refused, by kind; any thread."""
    counts = Counter[str](dict.fromkeys(REJECTIONS, 0))
    for seal in seals:
        counts.update(seal.rejections())
    return dict(counts)
