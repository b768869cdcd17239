"""Random lives of a cache: whatever happens in whatever order, no wrong byte and no lost page."""

from __future__ import annotations

import uuid
from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hicache_core.radix.node import Node
from tests.page_path.world import PAGE_SIZE, make_world

# A small alphabet of pages, so that prompts share prefixes, part, and meet again.
PROMPTS = st.lists(st.integers(0, 2), min_size=0, max_size=9).map(
    lambda pages: [token for page in pages for token in [page] * PAGE_SIZE] + [9]
)
POLICIES = st.sampled_from(["write_through", "write_through_selective", "write_back"])
EVICTION = st.sampled_from(["lru", "lfu", "fifo", "slru", "priority", "s3fifo", "arc"])
MODES = st.sampled_from(
    [("page_first", "kernel"), ("layer_first", "direct"), ("page_first_direct", "direct")]
)


class PagePath(RuleBasedStateMachine):
    """Requests, locks, evictions, restarts on one shared store; ``World`` checks every byte."""

    @initialize(
        policy=POLICIES,
        eviction=EVICTION,
        host_eviction=EVICTION,
        mode=MODES,
        ratio=st.sampled_from([0.5, 1.0, 3.0]),
        batch_pages=st.integers(1, 4),
    )
    def start(
        self,
        policy: str,
        eviction: str,
        host_eviction: str,
        mode: tuple[str, str],
        ratio: float,
        batch_pages: int,
    ) -> None:
        self.settings = {
            "hicache_write_policy": policy,
            "radix_eviction_policy": eviction,
            "hicache_host_eviction_policy": host_eviction,
            "hicache_mem_layout": mode[0],
            "hicache_io_backend": mode[1],
            "ratio": ratio,
            "batch_pages": batch_pages,
            "storage": {"share": uuid.uuid4().hex, "max_nbytes": 60_000},
            "device_pages": 20,
        }
        self.locked: list[Node] = []
        self.held = array("i")
        self.open_prefetches: list[str] = []
        self.world = make_world(**self.settings)

    @rule(prompt=PROMPTS, prefetch=st.booleans())
    def request(self, prompt: list[int], prefetch: bool) -> None:
        if len(self.held) + sum(n.depth_pages + n.n_pages for n in self.locked) < 8:
            self.world.request(prompt, prefetch=prefetch)

    @rule(prompt=PROMPTS)
    def ask_storage_and_leave(self, prompt: list[int]) -> None:
        """A request that is prefetched and not run yet."""
        request_id = f"open-{uuid.uuid4()}"
        if self.world.cache.prefetch(request_id, prompt):
            self.open_prefetches.append(request_id)

    @precondition(lambda self: self.open_prefetches)
    @rule(data=st.data())
    def abort_a_prefetch(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.open_prefetches) - 1))
        self.world.cache.finish_prefetch(self.open_prefetches.pop(index))

    @rule(prompt=PROMPTS)
    def lock(self, prompt: list[int]) -> None:
        if len(self.locked) < 2:
            match = self.world.cache.match_prefix(prompt)
            self.world.cache.lock(match.node)
            self.locked.append(match.node)

    @precondition(lambda self: self.locked)
    @rule()
    def unlock(self) -> None:
        self.world.cache.unlock(self.locked.pop())

    @rule(n=st.integers(1, 3))
    def hold_pages(self, n: int) -> None:
        if len(self.held) + n <= 4:
            self.held += self.world.cache.allocate(n)

    @precondition(lambda self: self.held)
    @rule()
    def free_pages(self) -> None:
        self.world.cache.free(self.held)
        self.held = array("i")

    @rule(n=st.integers(1, 20))
    def evict(self, n: int) -> None:
        self.world.cache.evict(n)

    @rule()
    def poll(self) -> None:
        self.world.cache.poll()

    @rule()
    def flush(self) -> None:
        assert self.world.cache.flush(10.0)

    @rule()
    def restart(self) -> None:
        """A new process: device and host are empty, storage is what it was."""
        self.teardown()
        self.locked, self.held, self.open_prefetches = [], array("i"), []
        self.world = make_world(**self.settings)

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            for node in self.locked:
                self.world.cache.unlock(node)
            self.world.cache.free(self.held)
            for request_id in self.open_prefetches:
                self.world.cache.finish_prefetch(request_id)
            self.world.close()


TestPagePath = PagePath.TestCase
TestPagePath.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
