"""The replay of a trace: its arrivals, its lengths, and the prefixes that its prompts share."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hicache_core.bench.client import Client
from hicache_core.bench.prompts import WORDS, Words
from hicache_core.bench.result import Record
from hicache_core.bench.traces import TraceRequest, scaled
from hicache_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Replay:
    """How a trace is sent.

    Attributes:
        block_tokens: words that replace a block of the trace; all lengths are scaled with it. None
            for as many words as a block has tokens.
        time_scale: seconds that a second of the trace takes; 0 sends as fast as possible.
        max_parallel: requests that may run at the same time.
        max_output: tokens in an answer at most.
    """

    block_tokens: int | None = None
    time_scale: float = 1.0
    max_parallel: int = 64
    max_output: int = 1 << 30


class Prompts:
    """The prompts of a trace: two prompts share exactly the blocks that their requests share.

    A block begins with its number, written in words, lowest digit first. So blocks with different
    names differ from their first words on, whatever the random words after them.
    """

    def __init__(self, requests: Sequence[TraceRequest]) -> None:
        """Numbers the blocks of ``requests``, which are scaled already.

        Raises:
            ConfigError: blocks are too short to tell them apart.
        """
        names = dict.fromkeys(name for request in requests for name in request.blocks)
        self._numbers = {name: n for n, name in enumerate(names)}
        self._n_digits = next(n for n in itertools.count(1) if len(WORDS) ** n >= len(names))
        shortest = min((one.block_tokens for one in requests if one.blocks), default=1 << 30)
        if shortest < self._n_digits:
            raise ConfigError(
                f"blocks of {shortest} words cannot tell the {len(names)} blocks of the trace "
                f"apart; --block-tokens must be at least {self._n_digits}"
            )

    def text(self, request: TraceRequest) -> str:
        """The prompt of a request, each word after a space; the last block may be cut short."""
        if request.text:
            return request.text
        words: list[str] = []
        for name in request.blocks:
            words += self._block(name, request.block_tokens)
        return "".join(f" {word}" for word in words[: request.input_length])

    def _block(self, name: str, n_words: int) -> list[str]:
        number = self._numbers[name]
        digits = []
        for _ in range(self._n_digits):
            number, digit = divmod(number, len(WORDS))
            digits.append(WORDS[digit])
        rest = Words().text(n_words - len(digits), random.Random(f"block/{name}"))
        return digits + rest.split()


async def run_replay(
    replay: Replay,
    requests: Sequence[TraceRequest],
    client: Client,
    *,
    on_record: Callable[[Record], None] = lambda _record: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Record]:
    """Sends each request at its time in the trace, or as soon as ``max_parallel`` allows.

    A request of a session also waits until the one before it has been answered.

    Args:
        replay: how to send the trace.
        requests: the trace, sorted by time.
        client: sends the requests.
        on_record: called after each request, with its record.
        clock: seconds, increasing.

    Returns:
        A record for each request, in the order in which they finished.

    Raises:
        ConfigError: ``block_tokens`` is too small for the trace.
    """
    requests = [scaled(request, replay.block_tokens) for request in requests]
    prompts = Prompts(requests)
    began, first_s = clock(), requests[0].at_s
    room = asyncio.Semaphore(replay.max_parallel)
    records: list[Record] = []

    async def one(
        n: int, request: TraceRequest, before: asyncio.Event, done: asyncio.Event
    ) -> None:
        await asyncio.sleep(began + (request.at_s - first_s) * replay.time_scale - clock())
        await before.wait()
        try:
            async with room:
                prompt = prompts.text(request)
                sent_s = clock() - began
                reply = await client.send(prompt, min(replay.max_output, request.output_length))
        finally:
            done.set()
        record = Record(n, 0, sent_s, len(prompt.split()), reply)
        records.append(record)
        on_record(record)

    await asyncio.gather(*(one(n, *turn) for n, turn in enumerate(_turns(requests))))
    return records


def _turns(
    requests: Sequence[TraceRequest],
) -> list[tuple[TraceRequest, asyncio.Event, asyncio.Event]]:
    """Each request with what it waits for and what it sets: its session's events, in a chain."""
    last: dict[str, asyncio.Event] = {}
    turns = []
    for request in requests:
        before = last.get(request.session) if request.session else None
        if before is None:
            before = asyncio.Event()
            before.set()
        done = last[request.session] = asyncio.Event()
        turns.append((request, before, done))
    return turns
