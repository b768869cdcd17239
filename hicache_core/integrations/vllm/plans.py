"""What vLLM's scheduler wants of the store for each request: fetch ahead, load, save.

The scheduler has no store of its own. It sends the hashes of a request's blocks to the workers,
which read and verify the pages, and report how many leading ones they hold. Only these are promised
to vLLM, so a promise never fails. Imports no vLLM.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from hicache_core.integrations.vllm.verdicts import MAX_AGE_S

MAX_FETCH_S = 30.0
"""How long a request waits for its fetch; then it is computed."""


class Request(Protocol):
    """What is used of vLLM's request.

    Attributes:
        request_id: its id.
        num_tokens: tokens of the prompt and of the output so far.
        block_hashes: of the full blocks of these tokens; they have salt, LoRA and images in them.
        skip_reading_prefix_cache: whether all of the prompt must be computed.
    """

    request_id: str
    num_tokens: int
    block_hashes: Sequence[bytes]
    skip_reading_prefix_cache: bool


class Fetch(NamedTuple):
    """Pages to read and verify now, before the request has blocks."""

    fetch_id: int
    hashes: Sequence[bytes]


class Load(NamedTuple):
    """Fetched pages to copy into blocks before the step computes; the others are dropped.

    Attributes:
        fetch_id: the fetch that they came with.
        skip: how many of its leading pages are not needed.
        block_ids: where to copy the next ones to.
    """

    fetch_id: int
    skip: int
    block_ids: Sequence[int]


class Save(NamedTuple):
    """Blocks that are full when the step has computed."""

    hashes: Sequence[bytes]
    block_ids: Sequence[int]


@dataclass(slots=True)
class Step:
    """What the workers do in one step.

    Attributes:
        fetches: reads to start.
        loads: copies to make before the step computes.
        saves: blocks to store after it.
        drops: ids of fetches that nobody waits for any more.
    """

    fetches: list[Fetch] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Asked:
    """A fetch on its way, or its answer.

    Attributes:
        fetch_id: its id.
        first: index of its first block in the request.
        since_s: when it was asked.
        reports: how many leading pages each worker holds, as far as they said.
    """

    fetch_id: int
    first: int
    since_s: float
    reports: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Plan:
    """One request.

    Attributes:
        request: vLLM's.
        first: how many leading blocks vLLM itself had when it asked last.
        asked: the fetch that it waits for, or that waits for its blocks.
        n_saved: how many leading blocks are stored or on their way; None before its first step.
    """

    request: Request
    first: int = 0
    asked: _Asked | None = None
    n_saved: int | None = None


class Plans:
    """Decides for each request what to fetch, load and save.

    Threads: vLLM's scheduler only.
    """

    def __init__(self, block_size: int, n_workers: int, clock: Callable[[], float]) -> None:
        """Knows no request yet.

        Args:
            block_size: tokens in a block.
            n_workers: how many workers hold a part of each block.
            clock: seconds; only differences count.
        """
        self._block_size = block_size
        self._n_workers = n_workers
        self._clock = clock
        self._ids = itertools.count()
        self._plans: dict[str, _Plan] = {}
        self._asked: dict[int, _Asked] = {}
        self._step = Step()

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def n_fetches(self) -> int:
        """How many fetches the workers have been told of and hold, or work on."""
        return len(self._asked)

    def begin(self, request: Request) -> None:
        """Notes a request, or one that begins anew."""
        self.finish(request.request_id)
        self._plans[request.request_id] = _Plan(request)

    def matched_tokens(self, request: Request, n_computed: int) -> int | None:
        """Returns how many tokens behind the computed ones the workers hold, or None: ask again.

        The last token is never among them, since vLLM must compute one to go on from.

        Args:
            request: that is to be scheduled.
            n_computed: leading tokens that vLLM itself has; whole blocks.
        """
        plan = self._plan(request)
        plan.first = n_computed // self._block_size
        n_usable = min(len(request.block_hashes), (request.num_tokens - 1) // self._block_size)
        if request.skip_reading_prefix_cache or n_usable <= plan.first:
            return 0
        if plan.asked is not None and self._is_stale(plan.asked, plan.first):
            self._drop(plan)
        if plan.asked is None:
            plan.asked = self._ask(request.block_hashes[plan.first : n_usable], plan.first)
        asked = plan.asked
        if len(asked.reports) < self._n_workers:
            return None if self._clock() - asked.since_s < MAX_FETCH_S else 0
        n_held = asked.first + min(asked.reports)
        return max(0, min(n_held, n_usable) - plan.first) * self._block_size

    def allocated(self, request: Request, block_ids: Sequence[int], n_external: int) -> None:
        """Notes that a request has blocks, and which tokens are to be loaded into them.

        Args:
            request: that ``matched_tokens`` was asked for.
            block_ids: all of its blocks.
            n_external: tokens to load, behind those that vLLM itself had.
        """
        plan = self._plan(request)
        n_blocks = n_external // self._block_size
        if plan.asked is None or n_blocks == 0:
            self._drop(plan)
            return
        asked, plan.asked = plan.asked, None
        del self._asked[asked.fetch_id]
        behind = plan.first + n_blocks
        blocks = list(block_ids[plan.first : behind])
        self._step.loads.append(Load(asked.fetch_id, plan.first - asked.first, blocks))
        plan.n_saved = max(plan.n_saved or 0, behind)

    def scheduled(
        self,
        request_id: str,
        n_computed: int,
        n_new: int,
        blocks_of: Callable[[str], Sequence[Sequence[int]]],
    ) -> None:
        """Notes that a step computes tokens of a request; plans to save what is then full.

        A block of output may become known only after it was computed: it is saved in a later step.

        Args:
            request_id: of the request.
            n_computed: its tokens that are computed before the step.
            n_new: tokens that the step computes.
            blocks_of: returns the blocks of a request, for each cache group.
        """
        plan = self._plans.get(request_id)
        if plan is None:
            return
        if plan.n_saved is None:
            plan.n_saved = n_computed // self._block_size
        hashes = plan.request.block_hashes
        n_full = min((n_computed + n_new) // self._block_size, len(hashes))
        if n_full > plan.n_saved:
            new = slice(plan.n_saved, n_full)
            self._step.saves.append(Save(list(hashes[new]), list(blocks_of(request_id)[0][new])))
            plan.n_saved = n_full

    def fetched(self, reports: Mapping[int, Sequence[int]]) -> None:
        """Notes what workers report: for each fetch, the leading pages that they hold."""
        for fetch_id, counts in reports.items():
            asked = self._asked.get(fetch_id)
            if asked is not None:
                asked.reports.extend(counts)

    def finish(self, request_id: str) -> None:
        """Forgets a request."""
        plan = self._plans.pop(request_id, None)
        if plan is not None:
            self._drop(plan)

    def forget_fetches(self) -> None:
        """Drops every fetch: requests that wait ask again."""
        for plan in self._plans.values():
            self._drop(plan)

    def take_step(self) -> Step:
        """Returns what the workers are to do in the step that was planned."""
        step, self._step = self._step, Step()
        return step

    def _plan(self, request: Request) -> _Plan:
        """The plan of a request, which need not have been begun."""
        if request.request_id not in self._plans:
            self.begin(request)
        return self._plans[request.request_id]

    def _ask(self, hashes: Sequence[bytes], first: int) -> _Asked:
        asked = _Asked(next(self._ids), first, self._clock())
        self._asked[asked.fetch_id] = asked
        self._step.fetches.append(Fetch(asked.fetch_id, list(hashes)))
        return asked

    def _is_stale(self, asked: _Asked, first: int) -> bool:
        """Whether blocks before the fetched ones are gone, or an old answer was 'nothing'."""
        if asked.first > first:
            return True
        is_known = len(asked.reports) == self._n_workers
        is_old = self._clock() - asked.since_s > MAX_AGE_S
        return is_known and is_old and min(asked.reports) == 0

    def _drop(self, plan: _Plan) -> None:
        if plan.asked is not None:
            del self._asked[plan.asked.fetch_id]
            self._step.drops.append(plan.asked.fetch_id)
            plan.asked = None
