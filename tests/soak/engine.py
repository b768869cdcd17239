"""The engine of a soak: conversations of several tenants on one cache, every byte checked."""

from __future__ import annotations

import random
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.pools.device import DevicePool
from hicache_core.radix.node import Node
from hicache_core.types import Namespace
from tests.page_path.world import PAGE_SIZE, SPEC, World

DEVICE_PAGES = 64
TENANTS = [Namespace(), Namespace(cache_salt="tenant-b"), Namespace(extra_key="c", lora_id="l1")]
PREFETCH_S = 0.25
"""What a request waits for storage at most, and what it is bound by."""


class SoakWorld(World):
    """A world whose requests never wait for storage longer than the prefetch policy lets them.

    Attributes:
        waited_s: what requests waited for storage so far.
    """

    waited_s: float = 0.0

    def wait_for_prefetch(self, request_id: str, polls: int = 0) -> None:
        # docstring inherited
        began = time.perf_counter()
        while not self.cache.prefetch_ready(request_id):
            self.cache.wait(0.01)
            self.cache.poll()
        self.waited_s += time.perf_counter() - began


def open_world(storage: Mapping[str, Any]) -> SoakWorld:
    """A cache with little room on the device and the host, and a store attached.

    Args:
        storage: settings of a ``dynamic`` backend.
    """
    config = HiCacheConfig(
        page_size=PAGE_SIZE,
        hicache_ratio=1.5,
        hicache_storage_backend="dynamic",
        hicache_storage_backend_extra_config={
            "prefetch_threshold": PAGE_SIZE,
            "prefetch_timeout_base": PREFETCH_S,
            "prefetch_timeout_per_ki_token": 0.0,
            **storage,
        },
        hicache_storage_prefetch_policy="timeout",
        hicache_storage_threads=3,
        hicache_storage_max_write_nbytes=64 << 10,
    )
    pool = DevicePool(SPEC, PAGE_SIZE, DEVICE_PAGES)
    return SoakWorld(HiCache(config, SPEC, pool, batch_pages=4), pool)


class Engine:
    """Requests one after the other, now and then with pages held and prefixes locked.

    Attributes:
        latencies_s: how long each request took.
        waits_s: what each request waited for storage.
        pages: pages that requests found, by tier, and those that were computed.
    """

    def __init__(self, world: SoakWorld, seed: int) -> None:
        self._rng = random.Random(seed)
        self._held = array("i")
        self._locked: list[Node] = []
        self.world = world
        self.latencies_s = array("d")
        self.waits_s = array("d")
        self.pages: Counter[str] = Counter()

    def step(self) -> None:
        """One request, perhaps after some pressure was put on or taken off."""
        self._press()
        self.world.salt = self._rng.choice(TENANTS)
        began, waited_s = time.perf_counter(), self.world.waited_s
        outcome = self.world.request(list(self._prompt()))
        self.latencies_s.append(time.perf_counter() - began)
        self.waits_s.append(self.world.waited_s - waited_s)
        self.pages["device"] += outcome.device // PAGE_SIZE
        self.pages["host"] += (outcome.host - outcome.storage) // PAGE_SIZE
        self.pages["storage"] += outcome.storage // PAGE_SIZE
        self.pages["computed"] += outcome.computed_pages
        self.world.cache.poll()

    def release(self) -> None:
        """Gives back all that puts pressure on the pools."""
        for node in self._locked:
            self.world.cache.unlock(node)
        self._locked.clear()
        self.world.cache.free(self._held)
        self._held = array("i")

    def _prompt(self) -> Iterator[int]:
        """A conversation: a system prompt of few, turns that many share less and less."""
        system, user = self._rng.randrange(3), min(self._rng.randrange(60), self._rng.randrange(60))
        n_turns = self._rng.randrange(1, 5)
        yield from [system] * (2 * PAGE_SIZE)
        for turn in range(n_turns):
            yield from [1000 + 10 * user + turn] * (PAGE_SIZE * (1 + user % 3))
        yield 7

    def _press(self) -> None:
        draw = self._rng.random()
        if draw < 0.03:
            self.release()
        elif draw < 0.06 and len(self._held) < 8:
            self._held += self.world.cache.allocate(4)
        elif draw < 0.09 and len(self._locked) < 2:
            match = self.world.cache.match_prefix(list(self._prompt()), self.world.salt)
            self.world.cache.lock(match.node)
            self._locked.append(match.node)
        elif draw < 0.15:
            self.world.flush_device()
