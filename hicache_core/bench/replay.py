"""The replay of a trace in Mooncake's format: its arrivals, its lengths, its shared prefixes.

A line is a JSON object: ``timestamp`` in milliseconds, ``input_length`` and ``output_length`` in
tokens, ``hash_ids`` of the blocks of 512 tokens of the prompt; equal ids are equal blocks.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hicache_core.bench.client import Client
from hicache_core.bench.result import Record
from hicache_core.bench.words import Words
from hicache_core.errors import ConfigError

TRACE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of a trace: when it arrives, how long it is, which blocks it consists of."""

    at_s: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """How a trace is sent.

    Attributes:
        block_tokens: words in place of the 512 tokens of a block; all lengths shrink with it.
        time_scale: seconds here for a second of the trace; 0 sends as fast as may be.
        max_parallel: requests under way at once.
        max_output: tokens of an answer at most.
    """

    block_tokens: int = TRACE_BLOCK_TOKENS
    time_scale: float = 1.0
    max_parallel: int = 64
    max_output: int = 1 << 30


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The requests of a trace file, the first ``limit`` of them.

    Raises:
        ConfigError: it cannot be read; a line is no request; arrivals go backwards.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {path} cannot be read: {error}") from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()][:limit]
    requests = [_request(path, n, line) for n, line in numbered]
    if not requests:
        raise ConfigError(f"the trace {path} has no requests")
    for first, second in pairwise(requests):
        if second.at_s < first.at_s:
            raise ConfigError(f"the trace {path} is not in the order of its timestamps")
    return requests


def _request(path: Path, n: int, line: str) -> TraceRequest:
    try:
        fields: dict[str, Any] = json.loads(line)
        request = TraceRequest(
            float(fields["timestamp"]) / 1000,
            int(fields["input_length"]),
            int(fields["output_length"]),
            tuple(map(int, fields["hash_ids"])),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}, line {n}: no request of a trace: {error!r}") from error
    if not 0 < request.input_length <= TRACE_BLOCK_TOKENS * len(request.hash_ids):
        raise ConfigError(
            f"{path}, line {n}: {request.input_length} tokens do not fit "
            f"{len(request.hash_ids)} blocks of {TRACE_BLOCK_TOKENS}"
        )
    return request


def prompt_of(request: TraceRequest, words: Words, block_tokens: int) -> str:
    """The prompt of a request: equal blocks are equal texts; the last may be cut short."""
    n_words = max(1, round(request.input_length * block_tokens / TRACE_BLOCK_TOKENS))
    blocks = [words.text(block_tokens, random.Random(f"block/{id_}")) for id_ in request.hash_ids]
    return "".join(f" {word}" for word in "".join(blocks).split()[:n_words])


async def run_replay(
    replay: Replay,
    requests: Sequence[TraceRequest],
    client: Client,
    words: Words,
    *,
    on_record: Callable[[Record], None] = lambda _record: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Record]:
    """Sends each request when it arrives, or as soon as ``max_parallel`` allows.

    Returns:
        A record for each request, in the order in which they finished.
    """
    began, first_s = clock(), requests[0].at_s
    room = asyncio.Semaphore(replay.max_parallel)
    records: list[Record] = []
    scale = replay.block_tokens / TRACE_BLOCK_TOKENS

    async def one(n: int, request: TraceRequest) -> None:
        await asyncio.sleep(began + (request.at_s - first_s) * replay.time_scale - clock())
        prompt = prompt_of(request, words, replay.block_tokens)
        n_output = min(replay.max_output, max(1, round(request.output_length * scale)))
        async with room:
            sent_s = clock() - began
            reply = await client.send(prompt, n_output)
        record = Record(n, 0, sent_s, len(prompt.split()), reply)
        records.append(record)
        on_record(record)

    await asyncio.gather(*(one(n, request) for n, request in enumerate(requests)))
    return records
