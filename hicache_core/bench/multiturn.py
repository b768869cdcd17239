"""The multi-turn load: each request is the whole conversation so far and a new question."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from hicache_core.bench.client import Client
from hicache_core.bench.prompts import Words
from hicache_core.bench.result import Record


@dataclass(frozen=True, slots=True)
class MultiTurn:
    """The load. Lengths are in words of about one token each.

    Attributes:
        num_clients: number of conversations.
        max_parallel: requests that may run at the same time.
        request_length: words in the first request of each client.
        sub_question_input_length: words in each later question; 0 for ``request_length``.
        output_length: tokens of each answer.
        num_rounds: requests of each client.
        request_rate: requests per second on average; infinite sends without pauses.
        distribution: of the pauses: ``poisson`` or ``uniform``.
        ready_queue_policy: which waiting client is next: ``random`` or ``fifo``.
        shared_prefix_share: part of the first request that is the same for all clients, 0 to 1.
        seed: of all random choices.
    """

    num_clients: int = 8
    max_parallel: int = 8
    request_length: int = 512
    sub_question_input_length: int = 0
    output_length: int = 64
    num_rounds: int = 5
    request_rate: float = float("inf")
    distribution: str = "poisson"
    ready_queue_policy: str = "random"
    shared_prefix_share: float = 0.0
    seed: int = 1

    def pause_s(self, chance: random.Random) -> float:
        """The time until the next request may be sent."""
        if self.request_rate == float("inf"):
            return 0.0
        if self.distribution == "uniform":
            return chance.uniform(0.0, 2.0 / self.request_rate)
        return chance.expovariate(self.request_rate)


@dataclass
class _Conversation:
    client: int
    history: str
    round: int = 0


async def run_multiturn(
    load: MultiTurn,
    client: Client,
    words: Words,
    *,
    on_record: Callable[[Record], None] = lambda _record: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Record]:
    """Runs all conversations to their ends; one whose request fails ends there.

    Args:
        load: what to send.
        client: sends the requests.
        words: makes the texts.
        on_record: called with each finished request.
        clock: seconds, increasing.

    Returns:
        A record for each request, in the order in which they finished.
    """
    chance = random.Random(load.seed)
    ready = _conversations(load, words)
    records: list[Record] = []
    tasks: set[asyncio.Task[None]] = set()
    began = clock()

    async def turn(chat: _Conversation) -> None:
        sent_s = clock() - began
        reply = await client.send(chat.history, load.output_length)
        record = Record(chat.client, chat.round, sent_s, len(chat.history.split()), reply)
        records.append(record)
        on_record(record)
        chat.round += 1
        if not reply.error and chat.round < load.num_rounds:
            chat.history += reply.text + _question(load, words, chat)
            ready.append(chat)

    while ready or tasks:
        if ready and len(tasks) < load.max_parallel:
            at = chance.randrange(len(ready)) if load.ready_queue_policy == "random" else 0
            tasks.add(asyncio.create_task(turn(ready.pop(at))))
            await asyncio.sleep(load.pause_s(chance))
        else:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in [task for task in tasks if task.done()]:
            tasks.discard(task)
            task.result()
    return records


def _conversations(load: MultiTurn, words: Words) -> list[_Conversation]:
    """The first requests: a part that all share, then what is each client's own."""
    n_shared = round(load.request_length * load.shared_prefix_share)
    shared = words.text(n_shared, random.Random(f"{load.seed}"))
    return [
        _Conversation(
            client,
            shared + words.text(load.request_length - n_shared, _chance(load, client, 0)),
        )
        for client in range(load.num_clients)
    ]


def _question(load: MultiTurn, words: Words, chat: _Conversation) -> str:
    n_words = load.sub_question_input_length or load.request_length
    return words.text(n_words, _chance(load, chat.client, chat.round))


def _chance(load: MultiTurn, client: int, round_: int) -> random.Random:
    """A generator for one client and round, so that its questions are the same in each run."""
    return random.Random(f"{load.seed}/{client}/{round_}")
