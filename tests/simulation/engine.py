"""The engine of one rank: requests that hold pages, and every byte that they are served checked."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from hicache_core.controller.controller import Controller
from hicache_core.errors import LoadFailed, PoolExhausted
from hicache_core.kv.keys import chain_seed
from hicache_core.pools.device import DevicePool
from hicache_core.radix.node import Node
from hicache_core.radix.results import Match
from hicache_core.types import Namespace
from tests.simulation.clock import InvariantBroken
from tests.simulation.content import TOKEN_NBYTES, Contents
from tests.simulation.units import Held, RequestUnits


class State(enum.Enum):
    """How far a request is."""

    WAITING = "waiting"  # for its prefetch, or for room on the device
    LOADED = "loaded"  # it has its pages; what was cached may still be on its way up
    COMPUTED = "computed"  # every whole page of its tokens holds its KV


@dataclass(slots=True)
class Request:
    """One request.

    Attributes:
        request_id: its name.
        tokens: packed token ids: the prompt, and what was decoded since.
        namespace: its tenant or adapter.
        state: how far it is.
        pages: device pages, one for each started page of ``tokens``, in order.
        n_shared: leading pages that belong to the tree.
        node: what it has locked in the tree.
        n_failed_loads: of its cache, when it was matched.
        priority: passed to ``insert``.
        units: what it has of each group.
    """

    request_id: str
    tokens: bytes
    namespace: Namespace
    priority: int = 0
    state: State = State.WAITING
    pages: array[int] = field(default_factory=lambda: array("i"))
    n_shared: int = 0
    node: Node | None = None
    n_failed_loads: int = 0
    units: list[Held] = field(default_factory=list)

    @property
    def own_pages(self) -> array[int]:
        """Pages that the request holds itself."""
        return self.pages[self.n_shared :]


class Engine:
    """Drives one controller as an engine does. Each method is one step; its result is what all
    ranks must agree on."""

    def __init__(self, cache: Controller, pool: DevicePool, shard: int) -> None:
        """An engine without requests, for ranks that hold the part ``shard`` of the KV."""
        self.cache = cache
        self.pool = pool
        self.shard = shard
        self.requests: dict[str, Request] = {}
        self._contents = Contents(pool, shard)
        self.units = RequestUnits(cache, pool, shard)
        self._page_nbytes = pool.page_size * TOKEN_NBYTES

    def arrive(self, request: Request, *, prefetch: bool) -> bool:
        """A request comes; whether storage is asked for it."""
        self.requests[request.request_id] = request
        if not prefetch:
            return False
        return self.cache.prefetch(request.request_id, request.tokens, request.namespace)

    def start(self, request_id: str) -> tuple[int, ...]:
        """Lets a waiting request run if it may; tokens that each tier had, empty if it waits on."""
        request, cache = self.requests[request_id], self.cache
        if not cache.prefetch_ready(request_id):
            return ()
        n_storage_tokens = cache.finish_prefetch(request_id)
        match = cache.match_prefix(request.tokens, request.namespace, request_id=request_id)
        self._check_explanation(request, match)
        cache.lock(match.node)
        request.n_failed_loads = cache.n_failed_loads
        loaded = cache.load_back(match)
        cache.lock(loaded.node)  # of a shorter prefix other units are needed
        cache.unlock(match.node)
        n_cached = len(loaded.device_pages)
        request.units, request.node = self.units.taken(loaded), loaded.node
        try:
            rest = cache.allocate(self._n_started(request) - n_cached)
        except PoolExhausted:
            self._release(request)
            return (n_storage_tokens, match.n_device_tokens, match.n_host_tokens)
        request.pages, request.n_shared = loaded.device_pages + rest, n_cached
        n_units = self.units.allocate(request.units, n_cached, self._n_whole(request))
        request.state = State.LOADED
        return (n_storage_tokens, match.n_device_tokens, match.n_host_tokens, n_cached, *n_units)

    def forward(self, request_id: str, page_s: float) -> bool:
        """Attention over what was cached, layer by layer; computes the rest, ``page_s`` a page.

        False if a load failed as far as this rank knows: it acts on that when all ranks know.
        """
        request = self.requests[request_id]
        if self._starts_over(request):
            return False
        seed = chain_seed(request.namespace)
        try:
            for layer in range(self.pool.spec.num_layers):
                self.cache.wait_layer(layer)
                self._check(request, seed, layer)
        except LoadFailed:
            return False
        self._compute(request, seed, request.n_shared)
        n_computed = self._n_whole(request) - request.n_shared
        self.cache.prefilled(n_computed * self.pool.page_size, n_computed * page_s)
        request.state = State.COMPUTED
        return True

    def loads_settled(self, request_id: str) -> bool:
        """Waits until all ranks know how all loads ended, as who inserts must; False, and the
        request starts over, if one has failed since it was matched."""
        request, cache = self.requests[request_id], self.cache
        while not cache.loads_settled:
            cache.wait(0.01)
            cache.poll()
        return not self._starts_over(request)

    def decode(self, request_id: str, tokens: bytes) -> bool:
        """Appends tokens; False, and nothing changed, if there is no page for them."""
        request = self.requests[request_id]
        n_before = self._n_whole(request)
        n_new = -(-(len(request.tokens) + len(tokens)) // self._page_nbytes) - len(request.pages)
        try:
            request.pages += self.cache.allocate(max(n_new, 0))
        except PoolExhausted:
            return False
        request.tokens += tokens
        self.units.allocate(request.units, n_before, self._n_whole(request))
        self._compute(request, chain_seed(request.namespace), n_before)
        return True

    def insert(self, request_id: str, *, received: bool = False, keep_end: bool = True) -> int:
        """Gives the tree what was computed so far and goes on; pages that it had already.

        Args:
            request_id: whose.
            received: as if another node had computed it.
            keep_end: as of ``Controller.insert``, which alone knows it.
        """
        request, cache = self.requests[request_id], self.cache
        n_whole = self._n_whole(request)
        tail = request.pages[n_whole:]
        insert = cache.insert_received if received else partial(cache.insert, keep_end=keep_end)
        result = insert(
            request.tokens,
            request.pages[:n_whole],
            request.namespace,
            priority=request.priority,
            groups=self.units.runs(request.units),
        )
        cache.lock(result.node)
        assert request.node is not None
        cache.unlock(request.node)
        cache.free(result.duplicates)
        request.units = self.units.inserted(request.units, result)
        request.node, request.n_shared = result.node, n_whole
        request.pages = result.pages + tail
        for layer in range(self.pool.spec.num_layers):
            self._check(request, chain_seed(request.namespace), layer)
        return result.n_known_pages

    def finish(self, request_id: str) -> int:
        """As ``insert``, and the request is gone."""
        n_known = self.insert(request_id)
        self._release(self.requests.pop(request_id))
        return n_known

    def abort(self, request_id: str) -> int:
        """The client went away; tokens that storage had delivered."""
        request = self.requests.pop(request_id)
        self._release(request)
        return self.cache.finish_prefetch(request_id)

    def held_pages(self) -> Iterator[int]:
        """Device pages that requests hold themselves."""
        for request in self.requests.values():
            yield from request.own_pages

    def _starts_over(self, request: Request) -> bool:
        """Whether a load has failed, on any rank, since the request was matched: then what it has
        may be gone, and it gives it up."""
        if self.cache.n_failed_loads == request.n_failed_loads:
            return False
        self._release(request)
        request.state = State.WAITING
        return True

    def _release(self, request: Request) -> None:
        self.cache.free(request.own_pages)
        self.units.release(request.units)
        if request.node is not None:
            self.cache.unlock(request.node)
        request.pages, request.n_shared, request.node = array("i"), 0, None
        request.units = []

    def _compute(self, request: Request, seed: bytes, first: int) -> None:
        last = self._n_whole(request)
        self._contents.write(seed, request.tokens, request.pages, first, last)
        self.units.compute(request.units, seed, request.tokens)

    def _check(self, request: Request, seed: bytes, layer: int) -> None:
        wrong = self._contents.first_wrong(
            seed, request.tokens, request.pages, request.n_shared, layer
        )
        if wrong is not None:
            raise InvariantBroken(
                f"no wrong bytes: {request.request_id} was served page {wrong} (device page "
                f"{request.pages[wrong]}), whose layer {layer} is not that of its tokens"
            )
        unit = self.units.first_wrong(request.units, seed, request.tokens, layer)
        if unit is not None:
            raise InvariantBroken(
                f"no wrong bytes: {request.request_id} was served a unit of {unit[0]} for page "
                f"{unit[1]} whose layer {layer} is not that of its tokens"
            )

    def _check_explanation(self, request: Request, match: Match) -> None:
        """Where a prompt came from adds up to the prompt, and is what was matched."""
        told = self.cache.explain(request.request_id)
        assert told is not None
        parts = told.device_tokens, told.host_tokens, told.storage_tokens, told.missed_tokens
        on_host = told.host_tokens + told.storage_tokens
        n_from_host = match.n_tokens_from_host
        if (
            sum(parts) != len(request.tokens) // TOKEN_NBYTES
            or min(parts) < 0
            or (told.device_tokens, on_host) != (match.n_tokens - n_from_host, n_from_host)
        ):
            raise InvariantBroken(f"explain adds up: {told} of {match}")

    def _n_whole(self, request: Request) -> int:
        return len(request.tokens) // self._page_nbytes

    def _n_started(self, request: Request) -> int:
        return -(-len(request.tokens) // self._page_nbytes)
