"""The lines about a server that is ready: model, tiers, storage, addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hicache_core.observe.event_settings import events_config
from hicache_core.observe.snapshot import CacheSnapshot, GroupStatus, PoolStatus
from hicache_core.server.service import Service

if TYPE_CHECKING:
    from hicache_core.build.cache import HiCache

_PATIENCE_S = 10.0


def summary(service: Service, url: str) -> Iterator[str]:
    """Yields what an operator wants to know of a server that starts.

    Args:
        service: over an open engine.
        url: where it will answer.
    """
    settings, engine = service.settings, service.engine
    config = settings.cache.resolve().in_force
    snapshot, context = engine.cache.snapshot(), engine.status().context_length
    ranks = f"; {settings.tp} ranks, each with these sizes" if settings.tp > 1 else ""
    model = f"model {settings.model_path}, context {context:,} tokens"
    yield f"{model}, pages of {config.page_size} tokens{ranks}"
    device = _tier(snapshot, snapshot.device, [group.device for group in snapshot.groups])
    yield f"device tier: {device}"
    if snapshot.host is None:
        yield "host tier: none (--enable-hierarchical-cache adds it)"
    else:
        host = _tier(snapshot, snapshot.host, [group.host for group in snapshot.groups])
        yield f"host tier: {host}; {config.hicache_write_policy}"
    storage = _storage(snapshot, engine.call(_namespaces, _PATIENCE_S))
    prefetch = f"; prefetch {config.hicache_storage_prefetch_policy}" if storage else ""
    yield f"storage tier: {storage or 'none'}{prefetch}"
    yield f"page {url}/hicache/"
    yield f"metrics {url}/metrics" if settings.enable_metrics else "metrics off (--enable-metrics)"
    if status_url := engine.cache.status_url:
        yield f"status server {status_url}"
    if events := events_config(config.kv_events_config):
        yield f"KV events {events.endpoint}"


def _storage(snapshot: CacheSnapshot, namespaces: Sequence[str]) -> str:
    """The stores and the namespaces in them; empty without storage."""
    if not namespaces:
        return ""
    stores = ", then ".join(backend.name for backend in snapshot.backends)
    groups = f", of its groups {', '.join(namespaces[1:])}" if namespaces[1:] else ""
    return f"{stores}, namespace {namespaces[0]}{groups}"


def _namespaces(cache: HiCache) -> Sequence[str]:
    """Storage namespaces of the full pages and of each group; none without storage."""
    tier = cache.parts.storage
    current = None if tier is None else tier.current
    return () if current is None else (current.namespace, *current.group_namespaces)


def _tier(snapshot: CacheSnapshot, pool: PoolStatus, units: Sequence[PoolStatus | None]) -> str:
    """Tokens and bytes of the pools of one tier."""
    nbytes = pool.n_pages * snapshot.page_nbytes
    parts = [f"{pool.n_pages * snapshot.page_size:,} tokens"]
    for group, held in zip(snapshot.groups, units, strict=True):
        if held is not None:
            nbytes += held.n_pages * group.unit_nbytes
            parts.append(_units(group, held))
    return f"{', '.join(parts)}, {_nbytes_text(nbytes)}"


def _units(group: GroupStatus, held: PoolStatus) -> str:
    if group.window:
        return f"{held.n_pages * group.unit_tokens:,} tokens of {group.name}"
    return f"{held.n_pages:,} snapshots of {group.name}"


def _nbytes_text(nbytes: int) -> str:
    """Bytes as the settings have them: GB are 10**9 bytes."""
    if nbytes >= 10**9:
        return f"{nbytes / 1e9:,.2f} GB"
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 10**6 else f"{nbytes:,} bytes"
