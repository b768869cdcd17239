"""What every test asks an engine: the same prompts, in one process and then in another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.engines.child import Child
from tests.engines.lmcache_server import LMCacheServer
from tests.engines.models import prompt

PROMPTS = [prompt(0), prompt(1)]
OTHER_PROMPTS = [prompt(kind) for kind in range(2, 8)]
N_NEW = 8
BOUND_S = 60.0
"""No request takes longer while a store is lost; the tiny model itself needs a second."""


class Engine:
    """An engine with a store below its own memory.

    Attributes:
        child: its runner.
        n_cached: how many tokens of a prompt the store can have: whole pages, without the last
            token, which is always computed.
    """

    def __init__(
        self, child: Child, page_size: int, found: str, server: LMCacheServer | None = None
    ) -> None:
        """Wraps a runner.

        Args:
            child: is ready.
            page_size: tokens of an object in the store.
            found: the value of an answer that says how many tokens came from the store, once the
                engine's own memory is empty.
            server: what stands between the engine and the store, with memory of its own.
        """
        self.child = child
        self.n_cached = (len(PROMPTS[0]) - 1) // page_size * page_size
        self._found = found
        self._server = server

    def alone(self) -> list[list[int]]:
        """The tokens of ``PROMPTS`` when nothing is cached anywhere; then it forgets them."""
        answers = self._ask(PROMPTS)
        assert [answer["cached"] for answer in answers] == [0] * len(PROMPTS)
        self.forget()
        return [answer["tokens"] for answer in answers]

    def answers(self, prompts: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
        """The tokens of each answer, and how many tokens of each prompt came from the store."""
        self.forget()
        answers = self._ask(prompts)
        found = [answer[self._found] for answer in answers]
        return [answer["tokens"] for answer in answers], found

    def hits(self, expected: list[list[int]]) -> list[int]:
        """How many tokens of ``PROMPTS`` come from the store; the answers must be right."""
        tokens, found = self.answers(PROMPTS)
        assert tokens == expected
        return found

    def store_all(self, expected: list[list[int]]) -> None:
        """Returns when it has stored ``PROMPTS``, since it finds them there again."""
        everything = [self.n_cached] * len(PROMPTS)
        wait_until(lambda: self.hits(expected) == everything, "every page is stored", 120)

    def forget(self) -> None:
        """Empties the memory of engine and server, once they are idle; the store stays."""
        wait_until(lambda: bool(self.child.ask("forget")), "the engine is idle")
        if self._server is not None:
            self._server.forget()

    def kill(self) -> None:
        """Ends engine and server at once."""
        self.child.kill()
        if self._server is not None:
            self._server.kill()

    def _ask(self, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self.child.ask("generate", prompts=prompts, n_new=N_NEW)
        assert [answer["finish"] for answer in answers] == ["length"] * len(prompts)
        assert max(answer["seconds"] for answer in answers) < BOUND_S
        return answers


def wait_until(holds: Callable[[], bool], what: str, within_s: float = 30) -> None:
    """Returns when it holds."""
    until = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until, f"not after {within_s} s: {what}"
        time.sleep(0.05)


def flip(page: Path) -> None:
    """Flips a high bit of each 1,024th value of 16 bits."""
    damaged = bytearray(page.read_bytes())
    for high_byte in range(1, len(damaged), 2048):
        damaged[high_byte] ^= 0x40
    page.write_bytes(damaged)
