"""Short words for prompts, of about one token each, so that lengths in tokens are about right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from hicache_core.errors import ConfigError

WORDS = """
    time year people way day man thing woman life child world school state family student group
    country problem hand part place case week company system program question work government
    number night point home water room mother area money story fact month lot right study book
    eye job word business issue side kind head house service friend father power hour game line
    end member law car city community name president team minute idea body information back
    parent face level office door health person art war history party result change morning
""".split()  # noqa: SIM905 - a list of this length reads better as text


class Words:
    """Makes texts of so many words; each begins with a space, so that texts may be joined."""

    def __init__(self, source: list[str] | None = None) -> None:
        """Takes runs of words from ``source``; without it, random words."""
        self._source = source

    def text(self, n_words: int, chance: random.Random) -> str:
        """``n_words`` words that depend on ``chance`` alone."""
        if not self._source:
            return "".join(f" {word}" for word in chance.choices(WORDS, k=n_words))
        start = chance.randrange(len(self._source))
        run = self._source[start:] + self._source[:start]
        repeated = run * (n_words // len(run) + 1)
        return "".join(f" {word}" for word in repeated[:n_words])


def words_of_file(path: Path) -> list[str]:
    """The words of a text file, or of the conversations of a file in ShareGPT's format.

    Raises:
        ConfigError: it cannot be read, or has no words.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the dataset {path}: {error}") from error
    if path.suffix == ".json":
        text = _conversations(path, text)
    words = text.split()
    if not words:
        raise ConfigError(f"the dataset {path} has no words")
    return words


def _conversations(path: Path, text: str) -> str:
    try:
        chats: list[dict[str, Any]] = json.loads(text)
        turns = [turn["value"] for chat in chats for turn in chat["conversations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the dataset {path} is not a list of conversations in ShareGPT's format: {error!r}"
        ) from error
    return " ".join(str(turn) for turn in turns)
