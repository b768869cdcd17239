"""Traces of lengths only: their formats, and prefixes that a seeded generator makes for them."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from hicache_core.errors import ConfigError

BLOCK_TOKENS = 16
"""Tokens of a block that the generator makes."""

MAX_TOKENS = 100_000_000
"""A longer prompt or answer is a mistake in the trace."""

_RECENT = 1000
_TRIES = 8
_COLUMNS = (("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
            ("Timestamp", "Request tokens", "Response tokens"))  # fmt: skip


class Lengths(NamedTuple):
    """One request of which a trace has the lengths.

    Attributes:
        at_s: when it arrives, in seconds.
        n_input: tokens of the prompt.
        n_output: tokens of the answer.
    """

    at_s: float
    n_input: int
    n_output: int


@dataclass(frozen=True, slots=True)
class Sharing:
    """The prefixes that a trace of lengths is given, since it says nothing of them.

    With the probability ``continues`` a prompt continues an earlier one: one of the last 1,000,
    which is shorter. Otherwise it begins with one of the system prompts; the n-th of them is chosen
    n times as rarely as the first. All other blocks occur once.

    Attributes:
        continues: share of the prompts that continue another, from 0 to 1, where one is shorter.
        system_prompts: how many system prompts there are.
        system_tokens: tokens of a system prompt.
        seed: of the random choices.
    """

    continues: float = 0.5
    system_prompts: int = 8
    system_tokens: int = 512
    seed: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that is out of range."""
        if not 0 <= self.continues <= 1:
            raise ConfigError(f"continues is {self.continues}; it must be from 0 to 1")
        if self.system_prompts < 1 or self.system_tokens < 0:
            raise ConfigError(
                f"{self.system_prompts} system prompts of {self.system_tokens} tokens: there must "
                "be at least 1, of at least 0 tokens"
            )


def check_lengths(at_s: float, n_input: int, n_output: int) -> None:
    """Checks what a trace says of a request.

    Args:
        at_s: when it arrives, in seconds.
        n_input: tokens of the prompt.
        n_output: tokens of the answer.

    Raises:
        ValueError: one of them cannot be.
    """
    if not math.isfinite(at_s):
        raise ValueError(f"the time {at_s} is not a finite number")
    for what, n in (("a prompt", n_input), ("an answer", n_output)):
        if not 0 <= n <= MAX_TOKENS:
            raise ValueError(f"{what} has from 0 to {MAX_TOKENS:,} tokens, not {n:,}")


def read_csv(path: Path, limit: int | None) -> list[Lengths]:
    """The requests of a CSV file of Azure's LLM inference traces, or of BurstGPT.

    A request without an answer counts as one with an answer of one token.

    Args:
        path: the file, with a line of names.
        limit: number of requests; None for all.

    Raises:
        ConfigError: it cannot be read, lacks a column, or has a value that is not a number.
    """
    found: list[Lengths] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            names = _columns(path, rows.fieldnames or ())
            for row in rows:
                found.append(_row(f"{path}, line {rows.line_num}", row, names))
                if len(found) == limit:
                    break
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    return found


def blocks_for(lengths: Sequence[Lengths], sharing: Sharing) -> Iterator[tuple[str, ...]]:
    """Names of the blocks of each prompt, of ``BLOCK_TOKENS`` each; the last may be cut short."""
    chance = random.Random(sharing.seed)
    weights = list(accumulate(1 / (n + 1) for n in range(sharing.system_prompts)))
    made: list[tuple[str, ...]] = []
    for number, one in enumerate(lengths):
        n_blocks = -(-one.n_input // BLOCK_TOKENS)
        begin = _earlier(chance, lengths, made, one.n_input, sharing.continues)
        if not begin:
            (system,) = chance.choices(range(sharing.system_prompts), cum_weights=weights)
            n_system = min(sharing.system_tokens // BLOCK_TOKENS, n_blocks)
            begin = tuple(f"system/{system}/{n}" for n in range(n_system))
        made.append(begin + tuple(f"{number}/{n}" for n in range(len(begin), n_blocks)))
        yield made[-1]


def _earlier(
    chance: random.Random,
    lengths: Sequence[Lengths],
    made: Sequence[tuple[str, ...]],
    n_input: int,
    continues: float,
) -> tuple[str, ...]:
    """The whole blocks of a shorter prompt that this one continues; empty if it begins anew."""
    if not made or chance.random() >= continues:
        return ()
    for _ in range(_TRIES):
        n = chance.randrange(max(0, len(made) - _RECENT), len(made))
        if lengths[n].n_input < n_input:
            return made[n][: lengths[n].n_input // BLOCK_TOKENS]
    return ()


def _columns(path: Path, names: Sequence[str]) -> tuple[str, str, str]:
    for columns in _COLUMNS:
        if set(columns) <= set(names):
            return columns
    wanted = " or ".join(", ".join(columns) for columns in _COLUMNS)
    raise ConfigError(
        f"the trace {path} has the columns {', '.join(names) or 'none'}; a trace of lengths has "
        f"{wanted}"
    )


def _row(where: str, row: Mapping[str, str], names: tuple[str, str, str]) -> Lengths:
    at, n_input, n_output = (row[name] or "" for name in names)
    try:
        found = Lengths(_seconds(at), round(float(n_input)), round(float(n_output)))
        check_lengths(*found)
        return found._replace(n_input=max(1, found.n_input), n_output=max(1, found.n_output))
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _seconds(text: str) -> float:
    """Seconds, from a number or from a date with a time."""
    try:
        return float(text)
    except ValueError:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
