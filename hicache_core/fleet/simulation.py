"""The simulation: requests of a trace arrive at servers, in the order of the virtual time.

A server does one thing at a time, and says when it will do the next. Whatever is due first is done
first: an arrival, or a step of a server. A step is done as a whole, so what a server writes to
storage during a step of another may be seen by that one a step later.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from hicache_core.bench.traces import TraceRequest
from hicache_core.fleet.prompts import Prompts
from hicache_core.fleet.result import Result, Served
from hicache_core.fleet.routing import make_router
from hicache_core.fleet.server import Request, Server
from hicache_core.fleet.setting import UNLIMITED, Setting
from hicache_core.fleet.store import Store
from hicache_core.kv.keys import TOKEN_NBYTES


@dataclass(frozen=True, slots=True)
class Load:
    """How a trace arrives.

    Attributes:
        time_scale: seconds that a second of the trace takes.
        max_parallel: requests that the clients have sent and wait for, at most.
        max_output: tokens in an answer at most.
        request_rate: arrivals a second, at random, in place of the times of the trace; None to
            keep those.
        seed: of what is random.
    """

    time_scale: float = 1.0
    max_parallel: int | None = None
    max_output: int | None = None
    request_rate: float | None = None
    seed: int = 1


def simulate(
    setting: Setting, requests: Sequence[TraceRequest], load: Load | None = None
) -> Result:
    """Serves a trace; the same arguments give the same result.

    A request of a session is sent when the one before it has been answered.

    Args:
        setting: of the fleet.
        requests: the trace, sorted by time.
        load: how it arrives; as the trace says if None.
    """
    fleet = Fleet(setting, requests, load or Load())
    while fleet.step():
        pass
    return fleet.result()


class Fleet:
    """The servers and the arrivals of one simulation."""

    def __init__(self, setting: Setting, requests: Sequence[TraceRequest], load: Load) -> None:
        """Nothing has arrived.

        Args:
            setting: of the fleet.
            requests: the trace, sorted by time.
            load: how it arrives.
        """
        self._setting = setting
        self._requests = requests
        self._load = load
        self._prompts = Prompts(requests)
        self._store = _store(setting)
        self.servers = [Server(n, setting, self._store) for n in range(setting.servers)]
        self._router = make_router(setting.router, setting.servers)
        self._at_s = _arrivals(requests, load)
        waits = set(self._prompts.successors.values())
        self._arrivals = [(at_s, n) for n, at_s in enumerate(self._at_s) if n not in waits]
        heapify(self._arrivals)
        self._held: deque[int] = deque()  # they wait until fewer requests run
        self._releases: list[tuple[float, int, int]] = []  # when, server, tokens: a heap
        self._n_running = self._n_refused = 0
        self._served: list[Served] = []

    def step(self) -> bool:
        """Does what is due first; False if nothing is."""
        server = min(self.servers, key=lambda one: one.next_s)
        if self._arrivals and self._arrivals[0][0] <= server.next_s:
            self._arrive(*heappop(self._arrivals))
        elif server.next_s < UNLIMITED:
            server.step()
            self._take_ended(server)
        else:
            return False
        return True

    def result(self) -> Result:
        """What has come out so far."""
        moved: dict[str, int] = {}
        for server in self.servers:
            for way, nbytes in server.moved_nbytes.items():
                moved[way] = moved.get(way, 0) + nbytes
        counters = [server.cache.counters for server in self.servers]
        return Result(
            self._setting,
            self._served,
            self._n_refused,
            [server.n_computed_tokens for server in self.servers],
            moved,
            0 if self._store is None else self._store.n_pages * self._setting.page_nbytes,
            sum(one.backup_skipped_pages + one.store_dropped_pages for one in counters),
        )

    def _arrive(self, at_s: float, n: int) -> None:
        limit = self._load.max_parallel
        if limit is not None and self._n_running >= limit:
            self._held.append(n)
            return
        while self._releases and self._releases[0][0] <= at_s:
            _, number, n_tokens = heappop(self._releases)
            self._router.ended(number, n_tokens)
        request = self._request(n, at_s)
        if not self.servers[0].fits(request):
            self._n_refused += 1
            self._send_next(n, at_s)
            return
        prompt = request.tokens[: request.n_prompt * TOKEN_NBYTES]
        server = self.servers[self._router.pick(prompt, request.n_prompt + request.n_output)]
        self._n_running += 1
        server.arrive(request)
        self._take_ended(server)

    def _request(self, n: int, at_s: float) -> Request:
        given = self._requests[n]
        limit = self._load.max_output
        n_output = max(1, given.output_length if limit is None else min(limit, given.output_length))
        prompt = self._prompts.prompt(n)
        tokens = prompt + self._prompts.answer(n, n_output - 1)
        return Request(n, tokens, len(prompt) // TOKEN_NBYTES, n_output, at_s)

    def _take_ended(self, server: Server) -> None:
        ended, server.ended = server.ended, []
        for one in ended:
            self._n_running -= 1
            n_tokens = one.n_prompt + one.n_output
            heappush(self._releases, (one.finished_s, server.number, n_tokens))
            times = one.arrived_s, one.first_s, one.finished_s
            self._served.append(
                Served(one.number, server.number, one.n_prompt, one.n_output, one.cached, *times)
            )
            self._send_next(one.number, one.finished_s)
            if self._held:
                heappush(self._arrivals, (one.finished_s, self._held.popleft()))

    def _send_next(self, n: int, at_s: float) -> None:
        """Sends the request that waited for ``n`` in its session."""
        if (after := self._prompts.successors.get(n)) is not None:
            heappush(self._arrivals, (max(at_s, self._at_s[after]), after))


def _store(setting: Setting) -> Store | None:
    if not setting.storage_gb:
        return None
    is_limited = setting.storage_gb < UNLIMITED
    max_pages = setting.pages(setting.storage_gb) if is_limited else None
    return Store(max_pages, setting.storage.shared_nbytes_per_s)


def _arrivals(requests: Sequence[TraceRequest], load: Load) -> list[float]:
    """When each request arrives at the earliest, in seconds from the first."""
    if load.request_rate is None:
        return [(one.at_s - requests[0].at_s) * load.time_scale for one in requests]
    chance, at_s, found = random.Random(load.seed), 0.0, []
    for _ in requests:
        found.append(at_s)
        at_s += chance.expovariate(load.request_rate)
    return found
