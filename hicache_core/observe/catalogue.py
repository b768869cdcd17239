"""The catalogue of series: every metric that is exported; ``docs/metrics.md`` shows the same rows.

Names are given without the prefix. A series that SGLang 0.5.23 has too has SGLang's name.
"""

from __future__ import annotations

from collections.abc import Mapping

from hicache_core.observe.catalogue_groups import GROUPS
from hicache_core.observe.catalogue_storage import STORAGE
from hicache_core.observe.catalogue_transfers import TRANSFERS
from hicache_core.observe.series import (
    Series,
    counter,
    device_tokens,
    dropped,
    events,
    evicted,
    histogram,
    host_tokens,
    in_use,
    moved_bytes,
    moved_tokens,
    pool_pages,
    token_usage,
    unfulfilled,
    words,
)

TIERS = "`device`, `host`, `storage`"


HITS = (
    Series(
        "cached_tokens_total",
        "counter",
        "tokens",
        "Prompt tokens found in the cache, by tier.",
        words(lambda snapshot: snapshot.hit_tokens),
        {"cache_source": TIERS},
        sglang=True,
    ),
    Series(
        "missed_tokens_total",
        "counter",
        "tokens",
        "Prompt tokens that no tier had when the prefix was matched.",
        counter("missed_tokens"),
    ),
    Series(
        "explained_missed_tokens_total",
        "counter",
        "tokens",
        "Computed tokens of explained requests, by the reason why their first page was missed.",
        words(lambda snapshot: snapshot.missed_tokens),
        {"reason": "`none`, `never_seen`, `evicted`, …"},
    ),
    Series(
        "cache_hit_rate",
        "gauge",
        "share",
        "Share of cached tokens among the prompt tokens of the last minute.",
        lambda seen: [((), seen.hit_rate)],
        sglang=True,
    ),
)

OCCUPANCY = (
    Series(
        "token_usage",
        "gauge",
        "share",
        "Share of device pages that are neither free nor evictable.",
        token_usage,
        sglang=True,
    ),
    Series(
        "num_used_tokens",
        "gauge",
        "tokens",
        "Device tokens that are neither free nor evictable.",
        device_tokens(in_use),
        sglang=True,
    ),
    Series(
        "kv_used_tokens",
        "gauge",
        "tokens",
        "The same as `num_used_tokens`, for dashboards that ask for this name.",
        device_tokens(in_use),
        sglang=True,
    ),
    Series(
        "kv_available_tokens",
        "gauge",
        "tokens",
        "Free device tokens.",
        device_tokens(lambda pool: pool.free_pages),
        sglang=True,
    ),
    Series(
        "kv_evictable_tokens",
        "gauge",
        "tokens",
        "Cached device tokens that can be evicted now.",
        device_tokens(lambda pool: pool.evictable_pages or 0),
        sglang=True,
    ),
    Series(
        "hicache_host_used_tokens",
        "gauge",
        "tokens",
        "Tokens in the host pool.",
        host_tokens(lambda pool: pool.used_pages),
        sglang=True,
    ),
    Series(
        "hicache_host_total_tokens",
        "gauge",
        "tokens",
        "Tokens that the host pool can hold.",
        host_tokens(lambda pool: pool.n_pages),
        sglang=True,
    ),
    Series(
        "pool_pages",
        "gauge",
        "pages",
        "Pages of a pool, by state.",
        pool_pages,
        {
            "tier": "`device`, `host`",
            "state": "`free`, `locked`, `in_flight`, `evictable`",
        },
    ),
    Series(
        "quarantined_pages",
        "gauge",
        "pages",
        "Host pages that a stuck storage job may still access.",
        lambda seen: [((), seen.snapshot.quarantined_pages)],
    ),
    Series(
        "evicted_tokens_total",
        "counter",
        "tokens",
        "Device tokens freed by eviction, with a host copy or without.",
        counter("evicted_device_pages", tokens=True),
        sglang=True,
    ),
    Series(
        "hicache_dropped_tokens_total",
        "counter",
        "tokens",
        "Device tokens that were to be copied to the host, and were evicted without a copy.",
        dropped,
        {
            "reason": "`host_pressure` (`write_back`, and the host had no room), "
            "`write_through_unbacked_eviction`",
            "pool": "`kv`",
        },
        sglang=True,
    ),
    Series(
        "eviction_duration_seconds",
        "histogram",
        "seconds",
        "Time of each eviction that freed device pages, with the copies that it waited for.",
        histogram(lambda snapshot: snapshot.eviction_s),
        sglang=True,
    ),
    Series(
        "evicted_pages_total",
        "counter",
        "pages",
        "Pages that left a tier, by cause.",
        evicted,
        {
            "tier": TIERS,
            "cause": "`evicted`, `flushed`, `stored` (the host freed pages that storage has)",
        },
    ),
)

MOVES = (
    Series(
        "load_back_tokens_total",
        "counter",
        "tokens",
        "Tokens copied from host to device.",
        moved_tokens("load_back_tokens", "load_back"),
        {"pool": "`kv`, and the groups of the model: `swa`, `mamba`, …"},
        sglang=True,
    ),
    Series(
        "load_back_bytes_total",
        "counter",
        "bytes",
        "Bytes copied from host to device.",
        moved_bytes("load_back_tokens", "load_back"),
        sglang=True,
    ),
    Series(
        "load_back_duration_seconds",
        "histogram",
        "seconds",
        "Time of each copy from host to device.",
        histogram(lambda snapshot: snapshot.load_back_s),
        sglang=True,
    ),
    Series(
        "load_back_skipped_pages_total",
        "counter",
        "pages",
        "Host hits that were recomputed because the device had no room.",
        counter("load_back_skipped_pages"),
    ),
    Series(
        "hicache_backup_tokens_total",
        "counter",
        "tokens",
        "Tokens copied from device to host.",
        moved_tokens("backup_tokens", "backup"),
        {"pool": "`kv`, and the groups of the model: `swa`, `mamba`, …"},
        sglang=True,
    ),
    Series(
        "hicache_backup_bytes_total",
        "counter",
        "bytes",
        "Bytes copied from device to host.",
        moved_bytes("backup_tokens", "backup"),
        sglang=True,
    ),
    Series(
        "hicache_backup_duration_seconds",
        "histogram",
        "seconds",
        "Time of each copy from device to host.",
        histogram(lambda snapshot: snapshot.backup_s),
        sglang=True,
    ),
    Series(
        "backup_skipped_pages_total",
        "counter",
        "pages",
        "Pages not copied to the host because it had no room.",
        counter("backup_skipped_pages"),
    ),
)

PREFETCH = (
    Series(
        "prefetched_tokens_total",
        "counter",
        "tokens",
        "Tokens that storage delivered to the host.",
        counter("storage_loaded_tokens"),
        sglang=True,
    ),
    Series(
        "storage_prefetch_hit_tokens_total",
        "counter",
        "tokens",
        "Tokens that storage had, by its answers to prefetches, before room was taken for them.",
        counter("prefetch_found_pages", tokens=True),
        sglang=True,
    ),
    Series(
        "storage_prefetch_unfulfilled_tokens_total",
        "counter",
        "tokens",
        "Tokens that storage had but that were not loaded, by reason.",
        unfulfilled,
        {"reason": "`storage_transfer`, `host_capacity`"},
        sglang=True,
    ),
    Series(
        "prefetch_below_threshold_total",
        "counter",
        "requests",
        "Requests whose missing part was too short to ask storage for.",
        counter("prefetch_below_threshold"),
    ),
    Series(
        "prefetch_given_up_total",
        "counter",
        "requests",
        "Requests that continued before storage had delivered everything.",
        counter("prefetch_given_up"),
    ),
    Series(
        "prefetch_wait_seconds",
        "histogram",
        "seconds",
        "Time from `prefetch` to `finish_prefetch` of each request.",
        histogram(lambda snapshot: snapshot.prefetch_wait_s),
    ),
    Series(
        "admission_decisions_total",
        "counter",
        "requests",
        "Decisions on how much of the stored prefix to load, by outcome.",
        words(lambda snapshot: snapshot.admission),
        {"outcome": "`all`, `part`, `none`, `probe`"},
    ),
)

EVENTS = (
    Series(
        "kv_event_batches_total",
        "counter",
        "batches",
        "Batches of KV events that were published.",
        events("sent_batches"),
    ),
    Series(
        "kv_events_dropped_total",
        "counter",
        "runs of pages",
        "Runs of pages dropped because the publisher's queue was full.",
        events("dropped_runs"),
    ),
    Series(
        "kv_events_queued",
        "gauge",
        "runs of pages",
        "Runs of pages waiting to be published.",
        events("queued_runs"),
    ),
)

SERIES: Mapping[str, tuple[Series, ...]] = {
    "Hits": HITS,
    "Pools": OCCUPANCY,
    "Copies between device and host": MOVES,
    "Groups of layers": GROUPS,
    "Prefetch": PREFETCH,
    "Storage": STORAGE,
    "Transfers between prefill and decode": TRANSFERS,
    "KV events": EVENTS,
}
"""All series, by section of the docs."""
