"""The smallest world with groups: full pages, a window and a state, all functions of the prefix."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.kv.keys import pack_tokens
from hicache_core.kv.spec import Component, Group, GroupKind, KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.radix.results import LACKING, Match, NewUnits
from hicache_core.ranks.base import RankGroup
from hicache_core.types import Namespace

PAGE_SIZE = 4
PAGE_NBYTES = 4 * PAGE_SIZE
FINGERPRINT = "tiny-test-model"
N_LAYERS = 2


def spec_of(*components: Component, groups: tuple[Group, ...] = ()) -> KVSpec:
    return KVSpec(components, N_LAYERS, FINGERPRINT, (0, N_LAYERS), (0, 1, 1), groups)


KV = (Component("k", (1, 2), "float32"), Component("v", (1, 3), "float32"))
SWA = Group("swa", GroupKind.WINDOW, spec_of(Component("k", (1, 2), "float16")), window=7)
MAMBA = Group(
    "mamba",
    GroupKind.STATE,
    spec_of(Component("conv_0", (3, 2), "float32"), Component("recurrent_0", (5,), "float32")),
)

MIXES: dict[str, KVSpec] = {
    "full": spec_of(*KV),
    "full and window": spec_of(*KV, groups=(SWA,)),
    "full and state": spec_of(*KV, groups=(MAMBA,)),
    "full, window and state": spec_of(*KV, groups=(SWA, MAMBA)),
    "window": spec_of(groups=(SWA,)),
    "state": spec_of(groups=(MAMBA,)),
}


def content(tokens: bytes, page: int, what: str, layer: int, nbytes: int) -> bytes:
    """What a page or unit holds, from the whole prefix that ends with the page."""
    prefix = tokens[: (page + 1) * PAGE_NBYTES]
    return hashlib.shake_256(prefix + f"{what} {layer}".encode()).digest(nbytes)


@dataclass(frozen=True)
class Outcome:
    """What one request saw.

    Attributes:
        n_tokens: cached tokens, of whatever tier.
        cut_by: the group that made them fewer.
        n_loaded: pages and units that came from the host.
        storage: tokens that storage delivered.
    """

    n_tokens: int
    cut_by: str
    n_loaded: int
    storage: int


@dataclass
class GroupedWorld:
    """An engine that computes pages and units out of their prefix, on one cache."""

    cache: HiCache
    pool: DevicePool
    salt: Namespace = field(default_factory=Namespace)
    snapshot_pages: int = 3
    n_requests: int = 0

    def request(self, ids: Sequence[int]) -> Outcome:
        """One request from arrival to end; checks every byte that it is served."""
        tokens = pack_tokens(ids)
        self.n_requests += 1
        request_id = f"request-{self.n_requests}"
        self.prefetch(request_id, tokens)
        storage = self.cache.finish_prefetch(request_id)
        match = self.cache.match_prefix(tokens, self.salt, request_id=request_id)
        self.cache.lock(match.node)
        loaded = self.cache.load_back(match)
        for layer in range(N_LAYERS):
            self.cache.wait_layer(layer)
        self.check_match(tokens, loaded)
        self.compute(tokens, loaded)
        self.cache.unlock(match.node)
        self.cache.poll()
        self.check()
        on_host = sum(units.n_on_host for units in match.groups)
        return Outcome(loaded.n_tokens, match.cut_by, len(match.host_pages) + on_host, storage)

    def prefetch(self, request_id: str, tokens: bytes) -> None:
        if not self.cache.prefetch(request_id, tokens, self.salt):
            return
        for _ in range(10_000):
            if self.cache.prefetch_ready(request_id):
                return
            self.cache.wait(5.0)
            self.cache.poll()
            self.check()
        raise AssertionError(f"{request_id} never became ready")

    def compute(self, tokens: bytes, loaded: Match) -> None:
        """Computes the rest of a prompt and inserts all of it."""
        n_pages, n_cached = len(tokens) // PAGE_NBYTES, loaded.n_tokens // PAGE_SIZE
        if n_pages == n_cached:
            for group, own in enumerate(loaded.own):
                self.cache.free_units(group, own)
            return
        pages = loaded.device_pages + self.cache.allocate(n_pages - n_cached)
        for page in range(n_cached, n_pages):
            self.write(self.pool, tokens, page, pages[page], "kv")
        groups: list[list[NewUnits]] = []
        for at, group in enumerate(self.pool.spec.groups):
            boundaries = self.boundaries(group, n_cached, n_pages)
            new = self.cache.allocate_units(at, len(boundaries))
            for page, unit in zip(boundaries, new, strict=True):
                self.write(self.pool.groups[at], tokens, page, unit, group.name)
            loaded_units = loaded.groups[at]
            if group.kind is GroupKind.WINDOW:
                groups.append([NewUnits(loaded_units.first, loaded_units.device + new)])
            else:
                pages_of = [*range(loaded_units.first, n_cached), *boundaries]
                both = zip(pages_of, loaded_units.device + new, strict=True)
                groups.append([NewUnits(page, array("i", [unit])) for page, unit in both])
        result = self.cache.insert(tokens, pages, self.salt, groups=groups)
        self.cache.free(result.duplicates)
        for at, duplicates in enumerate(result.unit_duplicates):
            self.cache.free_units(at, duplicates)
        for group, units in zip(self.pool.spec.groups, result.units, strict=True):
            assert units.first == group.first_needed(n_pages, PAGE_SIZE)
            assert LACKING not in units.device

    def boundaries(self, group: Group, n_cached: int, n_pages: int) -> list[int]:
        """The pages whose units are computed: all of a window, some of a state."""
        if group.kind is GroupKind.WINDOW:
            return list(range(n_cached, n_pages))
        return [
            page
            for page in range(n_cached, n_pages)
            if page == n_pages - 1 or (page + 1) % self.snapshot_pages == 0
        ]

    def write(self, pool: DevicePool, tokens: bytes, page: int, unit: int, what: str) -> None:
        for component, layers in zip(pool.spec.components, pool.buffers, strict=True):
            for layer, buffer in enumerate(layers):
                row = buffer[unit].view(torch.uint8)
                data = content(tokens, page, f"{what}.{component.name}", layer, row.numel())
                row.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(row.shape))

    def check_match(self, tokens: bytes, loaded: Match) -> None:
        """Pages and units hold what their prefix says, and none that is needed is missing."""
        end = loaded.n_tokens // PAGE_SIZE
        for page, unit in enumerate(loaded.device_pages):
            self.check_unit(self.pool, tokens, page, unit, "kv")
        for at, units in enumerate(loaded.groups):
            group = self.pool.spec.groups[at]
            assert units.first == group.first_needed(end, PAGE_SIZE)
            assert units.first + len(units.device) == end
            for page, unit in enumerate(units.device, units.first):
                self.check_unit(self.pool.groups[at], tokens, page, unit, group.name)

    def check_unit(self, pool: DevicePool, tokens: bytes, page: int, unit: int, what: str) -> None:
        assert unit != LACKING
        for component, layers in zip(pool.spec.components, pool.buffers, strict=True):
            for layer, buffer in enumerate(layers):
                row = buffer[unit].contiguous().view(torch.uint8)
                expected = content(tokens, page, f"{what}.{component.name}", layer, row.numel())
                assert bytes(row.flatten().tolist()) == expected, (what, page, component, layer)

    def flush_device(self) -> None:
        """Empties the device tier as far as nothing is locked."""
        self.cache.evict(self.pool.n_pages)
        for group, pool in enumerate(self.pool.groups):
            self.cache.free_units(group, self.cache.allocate_units(group, pool.n_pages))

    def check(self) -> None:
        self.cache.check_integrity()

    def close(self) -> None:
        self.cache.flush(10.0)
        self.check()
        self.cache.close()


def make_grouped_world(
    mix: str = "full, window and state",
    *,
    device_pages: int = 32,
    n_units: int = 32,
    storage: dict[str, Any] | None = None,
    backend: str | None = None,
    batch_pages: int = 128,
    ranks: RankGroup | None = None,
    **settings: Any,
) -> GroupedWorld:
    """A world of one mix of groups; ``storage`` are the settings of the backend."""
    spec = MIXES[mix]
    extra: dict[str, Any] = {"prefetch_threshold": PAGE_SIZE} | (storage or {})
    config = HiCacheConfig(
        page_size=PAGE_SIZE,
        hicache_storage_backend=backend or ("memory" if storage is not None else None),
        hicache_storage_backend_extra_config=extra,
        hicache_storage_prefetch_policy="wait_complete",
        **settings,
    )
    pool = DevicePool.with_groups(spec, PAGE_SIZE, device_pages, [n_units] * len(spec.groups))
    return GroupedWorld(HiCache(config, spec, pool, batch_pages=batch_pages, ranks=ranks), pool)
