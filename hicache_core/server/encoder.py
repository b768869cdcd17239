"""Encoder: texts to tokens, beside the event loop; what cannot fit is refused by its length."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hicache_core.server.problems import Problem

T = TypeVar("T")

SHORT_NBYTES = 16 << 10
_LEAST_TOKEN_NBYTES = 64
"""Room for what stands between tokens and is in none of them, where a tokenizer drops it."""


class Encoder:
    """Two lanes, each with its own thread and tokenizer: short texts never wait for long ones.

    A text with more bytes than the tokens of a context can have is refused at once, so that a lane
    is never busy for longer than the longest valid prompt takes.
    """

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        """``tokenizer`` is transformers', or None to encode nothing; ``close`` ends the threads."""
        self._context_length = context_length
        words = () if tokenizer is None else tokenizer.get_vocab()
        longest = max((len(word.encode()) for word in words), default=0)
        self.max_nbytes = context_length * max(longest, _LEAST_TOKEN_NBYTES)
        self._short, self._long = _Lane("short", tokenizer), _Lane("long", copy.deepcopy(tokenizer))

    def close(self) -> None:
        """Joins the threads."""
        self._short.thread.shutdown()
        self._long.thread.shutdown()

    def check_length(self, nbytes: int) -> None:
        """Raises Problem for a text that has more tokens than the context for certain."""
        if nbytes > self.max_nbytes:
            raise Problem(
                400,
                f"the prompt has {nbytes} bytes; this server's context of {self._context_length} "
                f"tokens holds at most {self.max_nbytes}",
            )

    async def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """The tokens of a text; ``special``: with the special tokens that the tokenizer adds.

        Raises:
            Problem: the text is too long, or has no tokens.
        """

        def work(tokenizer: Any) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])

        tokens = await self.aside(work, self._nbytes(text))
        if not tokens:
            raise Problem(400, "the prompt has no token")
        return tokens

    async def aside(self, work: Callable[[Any], T], nbytes: int) -> T:
        """Runs ``work`` with a tokenizer on the lane for ``nbytes`` of text; its result.

        Raises:
            Problem: the text is too long.
        """
        self.check_length(nbytes)
        lane = self._short if nbytes <= SHORT_NBYTES else self._long
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(lane.thread, work, lane.tokenizer)

    def _nbytes(self, text: str) -> int:
        self.check_length(len(text))
        return len(text.encode())


class _Lane:
    def __init__(self, name: str, tokenizer: Any) -> None:
        self.thread = ThreadPoolExecutor(1, f"hicache-encode-{name}")
        self.tokenizer = tokenizer
        if tokenizer is not None:  # it starts now: later there may be no thread to be had
            self.thread.submit(int)
