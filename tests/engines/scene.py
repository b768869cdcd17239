"""What every test asks an engine: the same prompts, in one process and then in another."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engines.child import Child
from tests.engines.models import prompt

PROMPTS = [prompt(0), prompt(1)]
N_NEW = 8


def ask(engine: Child) -> list[dict[str, Any]]:
    """What the engine answers to ``PROMPTS``, each in bounded time and to its end."""
    answers: list[dict[str, Any]] = engine.ask("generate", prompts=PROMPTS, n_new=N_NEW)
    assert [answer["finish"] for answer in answers] == ["length"] * len(PROMPTS)
    return answers


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of each answer."""
    return [answer["tokens"] for answer in answers]


def whole(n_tokens: int) -> int:
    """How many tokens of a prompt are in whole pages of this size; the last is always computed."""
    return (len(PROMPTS[0]) - 1) // n_tokens * n_tokens


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


def stored_by(engine: Child, expected: list[list[int]], cached: int, found: str) -> None:
    """Returns when an engine has stored ``PROMPTS``: it finds them again without its own memory.

    Args:
        engine: is asked.
        expected: the right tokens.
        cached: how many tokens of each prompt a store can have.
        found: the value of an answer that says how many came from the store.
    """

    def finds_all() -> bool:
        wait_until(lambda: bool(engine.ask("forget")), "the engine is idle")
        answers = ask(engine)
        assert tokens(answers) == expected
        return [answer[found] for answer in answers] == [cached] * len(PROMPTS)

    wait_until(finds_all, "every page is stored")
