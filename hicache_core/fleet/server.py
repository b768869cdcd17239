"""One server: the real cache, and continuous batching whose computation only takes time."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush

from hicache_core.build.cache import WRITE_POLICIES
from hicache_core.build.storage import ADMISSIONS
from hicache_core.controller.attachment import Attachment
from hicache_core.controller.controller import Controller
from hicache_core.controller.jobs import JobTable
from hicache_core.controller.parts import Parts
from hicache_core.controller.policies import (
    BestEffort,
    Policies,
    PrefetchPolicy,
    Timeout,
    WaitComplete,
)
from hicache_core.controller.quarantine import Quarantine
from hicache_core.controller.storage_tier import StorageTier
from hicache_core.copies.base import Transfer
from hicache_core.errors import PoolExhausted
from hicache_core.fleet.links import Clock, Link, TimedQueue, TimedTransfer
from hicache_core.fleet.setting import Setting
from hicache_core.fleet.store import Store, TimedWorker
from hicache_core.kv.keys import TOKEN_NBYTES
from hicache_core.kv.spec import Component, KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from hicache_core.radix.eviction import eviction_policy
from hicache_core.radix.node import Node, path_to_root
from hicache_core.radix.results import Match, cached_tokens
from hicache_core.radix.tree import RadixTree
from hicache_core.ranks.base import SingleRank
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.types import BackendContext, CachedTokens

PREFETCH_POLICIES: dict[str, PrefetchPolicy] = {
    "best_effort": BestEffort(),
    "wait_complete": WaitComplete(),
    "timeout": Timeout(),
}
LOOK_S = 0.01
"""So often a server looks whether a request has waited long enough for storage."""
_NAMESPACE = "0" * 16


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way through a server.

    Attributes:
        number: of the request in the trace.
        tokens: packed ids of its prompt, then of its answer without the last token, whose KV
            nobody computes.
        n_prompt: tokens of the prompt.
        n_output: tokens of the answer.
        arrived_s: when it came.
        first_s: when its first token was known.
        finished_s: when its last token was known.
        cached: tokens of the prompt that the tiers had.
        n_computed: leading tokens whose KV is in its pages.
        pages: its device pages, of the tree and its own.
        n_stored: leading pages that the tree has.
        node: what it has locked in the tree.
        from_storage: tokens that storage delivered for it; None before it has started.
    """

    number: int
    tokens: bytes
    n_prompt: int
    n_output: int
    arrived_s: float
    first_s: float = 0.0
    finished_s: float = 0.0
    cached: CachedTokens = field(default_factory=CachedTokens)
    n_computed: int = 0
    pages: array[int] = field(default_factory=lambda: array("i"))
    n_stored: int = 0
    node: Node | None = None
    from_storage: int | None = None

    @property
    def request_id(self) -> str:
        """Its name for the cache."""
        return str(self.number)

    @property
    def usable(self) -> bytes:
        """All tokens of the prompt but the last, which is computed in any case."""
        return self.tokens[: max(0, self.n_prompt - 1) * TOKEN_NBYTES]


class Server:
    """Serves requests as the reference engine does: prompts in chunks, and a token of each answer.

    A step computes at most ``chunk_tokens`` of prompts, first come first served, then one token for
    each answer. A request starts when its whole prompt and answer have room on the device. Steps
    without a prompt are taken together, up to the next event.

    Attributes:
        number: of the server.
        clock: its time.
        cache: the real controller.
        next_s: when there is something to do; infinite while there is not.
        n_computed_tokens: of prompts.
        ended: requests that have ended and nobody has taken yet.
    """

    def __init__(self, number: int, setting: Setting, store: Store | None) -> None:
        """An idle server with an empty cache.

        Args:
            number: of the server.
            setting: of the fleet.
            store: what all servers share; None without storage.
        """
        self.number = number
        self.clock = Clock()
        self.next_s = math.inf
        self.n_computed_tokens = 0
        self.ended: list[Request] = []
        self._setting = setting
        up, down = (
            TimedQueue(self.clock, Link(setting.bus_nbytes_per_s), setting.page_nbytes)
            for _ in range(2)
        )
        self._up, self._down = up.link, down.link
        self._worker = self._new_worker(store)
        parts = _parts(setting, self.clock, up, down, self._worker)
        self.cache = Controller(parts)
        self._parts = parts
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        self._decoding: list[tuple[int, int, Request]] = []  # last step, number: a heap
        self._n_context = 0  # tokens that the sequences of a decode step attend to
        self._n_steps = 0  # decode steps so far
        self._run: tuple[float, float, int] | None = None  # start, seconds a step, steps
        is_timed = setting.prefetch_policy == "timeout" or setting.admission == "cost_aware"
        self._has_patience = is_timed  # which ends by the clock alone

    def _new_worker(self, store: Store | None) -> TimedWorker | None:
        setting = self._setting
        if store is None:
            return None
        return TimedWorker(
            self.clock, store, setting.storage, setting.page_nbytes, setting.storage_threads
        )

    @property
    def moved_nbytes(self) -> Mapping[str, int]:
        """Bytes that went between the tiers so far."""
        worker = self._worker
        return {
            "device_to_host": self._down.moved_nbytes,
            "host_to_device": self._up.moved_nbytes,
            "host_to_storage": 0 if worker is None else worker.writes.moved_nbytes,
            "storage_to_host": 0 if worker is None else worker.reads.moved_nbytes,
        }

    def fits(self, request: Request) -> bool:
        """Whether the device can hold prompt and answer at all."""
        return self._n_pages(request) <= self._parts.device.n_pages

    def arrive(self, request: Request) -> None:
        """A request comes; the step that is being computed at ``arrived_s`` ends first."""
        if self._run is not None:
            start_s, step_s, n_steps = self._run
            self._end_run(min(n_steps, _steps_until(request.arrived_s - start_s, step_s)))
        self.clock.reach(request.arrived_s)
        self.next_s = self.clock.now
        self._waiting.append(request)
        self.cache.prefetch(request.request_id, request.tokens[: request.n_prompt * TOKEN_NBYTES])

    def step(self) -> None:
        """Does what is due at ``next_s``."""
        self.clock.reach(self.next_s)
        if self._run is not None:
            self._end_run(self._run[2])
        self.cache.poll()
        if self._prefill(self._setting.chunk_tokens):
            if self._decoding:
                self._start_run()
                self._end_run(1)
            self.next_s = self.clock.now
        elif self._decoding:
            self._start_run()
        else:
            self.next_s = self._next_event_s()

    # Prompts.

    def _prefill(self, budget: int) -> bool:
        """Computes at most ``budget`` tokens of prompts; whether it computed any."""
        n_left = budget
        while n_left:
            if not self._prefilling and not self._admit_next():
                break
            request = self._prefilling[0]
            n_tokens = min(n_left, request.n_prompt - request.n_computed)
            n_left -= n_tokens
            self._compute(request, n_tokens)
        return n_left < budget

    def _admit_next(self) -> bool:
        """Starts the first waiting request that need not wait for storage, if it has room."""
        if len(self._decoding) + len(self._prefilling) >= self._setting.max_running:
            return False
        for request in self._waiting:
            if self.cache.prefetch_ready(request.request_id):
                if not self._has_room(request) or not self._admit(request):
                    return False
                self._waiting.remove(request)
                self._prefilling.append(request)
                return True
        return False

    def _has_room(self, request: Request) -> bool:
        """Whether there are pages that are free, may leave, or are in use and shared with it."""
        look = self.cache.match_prefix(request.usable, touch=False)
        in_use = (node.n_pages for node in path_to_root(look.device_node) if node.lock_count)
        n_room = self._parts.device.allocator.n_free + self._parts.tree.n_evictable_device_pages
        return self._n_pages(request) - sum(in_use) <= n_room

    def _n_pages(self, request: Request) -> int:
        return -(-len(request.tokens) // (self._setting.page_size * TOKEN_NBYTES))

    def _admit(self, request: Request) -> bool:
        """Gives a request the pages of its prompt and its answer; False if there are too few."""
        cache = self.cache
        if request.from_storage is None:
            request.from_storage = cache.finish_prefetch(request.request_id)
        match = cache.match_prefix(request.usable, n_behind=1)
        cache.lock(match.node)
        request.node = match.node
        loaded, own = self._allocate(request, match)
        if loaded is None:
            cache.free(own)
            cache.unlock(match.node)
            request.node = None
            return False
        request.pages = loaded.device_pages + own
        request.n_stored = len(loaded.device_pages)
        request.n_computed = loaded.n_tokens
        request.cached = cached_tokens(match, loaded, request.from_storage)
        return True

    def _allocate(self, request: Request, match: Match) -> tuple[Match | None, array[int]]:
        """Starts to load what the host has, and takes pages for the rest; None without room."""
        own = array("i")
        n_pages = self._n_pages(request)
        try:
            own = self.cache.allocate(n_pages - match.n_tokens // self._setting.page_size)
            loaded = self.cache.load_back(match)
            own += self.cache.allocate(n_pages - len(loaded.device_pages) - len(own))
        except PoolExhausted:
            return None, own
        return loaded, own

    def _compute(self, request: Request, n_tokens: int) -> None:
        """Computes the next tokens of a prompt.

        The first time, each layer waits for its part of the prefix, which may still be on its way.
        """
        speed, clock = self._setting.speed, self.clock
        is_first = request.n_computed == request.cached.total
        seconds = speed.prefill_s(n_tokens, request.n_computed) + is_first * speed.request_s
        end_s = clock.now + seconds
        if is_first and not self.cache.loads_settled:
            end_s = max(end_s, self._up.free_s + seconds / self._setting.layers)
        clock.reach(end_s)
        self.cache.poll()
        while not self.cache.loads_settled:
            self.cache.wait(LOOK_S)
            self.cache.poll()
        if not (is_first and request.cached.total):  # else it waited for pages as well
            self.cache.prefilled(n_tokens, seconds)
        self.n_computed_tokens += n_tokens
        request.n_computed += n_tokens
        if request.n_computed == request.n_prompt:
            self._prefilling.popleft()
            self._store(request)
            self._begin_answer(request)

    # Answers.

    def _begin_answer(self, request: Request) -> None:
        request.first_s = self.clock.now
        n_left = request.n_output - 1
        if n_left < 1:
            self._finish(request)
            return
        heappush(self._decoding, (self._n_steps + n_left, request.number, request))
        self._n_context += request.n_prompt

    def _start_run(self) -> None:
        """Begins steps that compute answers alone, until the first answer ends."""
        step_s = self._setting.speed.step_s(len(self._decoding), self._n_context)
        n_steps = self._decoding[0][0] - self._n_steps
        if (event_s := self._next_event_s()) < math.inf:
            n_steps = min(n_steps, _steps_until(event_s - self.clock.now, step_s))
        self._run = (self.clock.now, step_s, n_steps)
        self.next_s = self.clock.now + n_steps * step_s

    def _end_run(self, n_steps: int) -> None:
        """So many steps are done."""
        assert self._run is not None
        start_s, step_s, _ = self._run
        self._run = None
        self.clock.reach(start_s + n_steps * step_s)
        self._n_steps += n_steps
        self._n_context += n_steps * len(self._decoding)
        while self._decoding and self._decoding[0][0] <= self._n_steps:
            *_, request = heappop(self._decoding)
            self._n_context -= request.n_prompt + request.n_output - 1
            request.n_computed = len(request.tokens) // TOKEN_NBYTES
            self._finish(request)

    def _finish(self, request: Request) -> None:
        self._store(request)
        self.cache.free(request.pages[request.n_stored :])
        assert request.node is not None
        self.cache.unlock(request.node)
        request.finished_s = self.clock.now
        request.tokens, request.pages, request.node = b"", array("i"), None
        self.ended.append(request)

    def _store(self, request: Request) -> None:
        """Gives the whole pages that are computed to the tree, as the engine's page table does."""
        cache, page_size = self.cache, self._setting.page_size
        n_pages = request.n_computed // page_size
        if n_pages <= request.n_stored:
            return
        tokens = request.tokens[: n_pages * page_size * TOKEN_NBYTES]
        result = cache.insert(tokens, request.pages[:n_pages])
        cache.lock(result.node)
        assert request.node is not None
        cache.unlock(request.node)
        cache.free(result.duplicates)
        request.pages[:n_pages] = result.pages
        request.node, request.n_stored = result.node, n_pages

    def _next_event_s(self) -> float:
        """When the next copy or call of storage ends; infinite if none runs."""
        now, jobs = self.clock.now, self._parts.jobs
        if not jobs.n_jobs:
            return math.inf
        ends = [link.free_s for link in (self._up, self._down) if link.free_s > now]
        if jobs.has_reports or (jobs.n_copies and not ends):
            return now
        if self._worker is not None:
            ends.append(self._worker.next_s)
            if self._waiting and self._has_patience:
                ends.append(now + LOOK_S)
        return max(now, min(ends, default=math.inf))


def _steps_until(seconds: float, step_s: float) -> int:
    """Whole steps, at least one, until ``seconds`` have passed."""
    return max(1, math.ceil(seconds / max(step_s, 1e-9)))


def _parts(
    setting: Setting, clock: Clock, up: TimedQueue, down: TimedQueue, worker: TimedWorker | None
) -> Parts:
    """The parts of a cache, as ``build`` joins them; a token has one byte."""
    spec = KVSpec((Component("kv", (1,), "uint8"),), 1, "simulated", (0, 1), (0, 1, 1))
    policies = eviction_policy(setting.eviction), eviction_policy(setting.eviction)
    device = DevicePool(spec, setting.page_size, setting.pages(setting.device_gb))
    host: HostPool | None = None
    transfer: Transfer | None = None
    storage: StorageTier | None = None
    jobs = JobTable(SingleRank())
    if n_host := setting.pages(setting.host_gb):
        host = HostPool(spec, setting.page_size, n_host, LAYOUTS["page_first"])
        transfer = TimedTransfer(device, host, up, down)
        quarantine = Quarantine(jobs, host.allocator)
        storage = StorageTier(jobs, quarantine, partial(_attachment, setting, worker))
        if worker is not None:
            storage.open("simulated", {})
    return Parts(
        page_size=setting.page_size,
        tree=RadixTree(setting.page_size, *policies),
        device=device,
        host=host,
        transfer=transfer,
        policies=Policies(
            WRITE_POLICIES[setting.write_policy],
            PREFETCH_POLICIES[setting.prefetch_policy],
            setting.prefetch_threshold,
        ),
        jobs=jobs,
        storage=storage,
        clock=clock,
        sleep=clock.advance,
    )


def _attachment(
    setting: Setting, worker: TimedWorker | None, name: str, _settings: Mapping[str, object]
) -> Attachment:
    assert worker is not None
    admission = ADMISSIONS[setting.admission]()
    return Attachment(name, _no_backend(), worker, _NAMESPACE, admission=admission)


def _no_backend() -> StorageBackend:
    """A backend that nobody calls: the worker answers by itself."""
    return MemoryBackend(MemoryConfig(), BackendContext(_NAMESPACE))
