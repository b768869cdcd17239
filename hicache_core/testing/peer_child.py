"""What the second process runs: ``python -m hicache_core.testing.peer_child``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TextIO

from hicache_core.config.redact import masked_text
from hicache_core.storage.base import StorageBackend
from hicache_core.testing.content import content, difference
from hicache_core.testing.recipe import Recipe


def _put(backend: StorageBackend, keys: Sequence[str], nbytes: int) -> object:
    for key in keys:
        backend.set(key, content(key, nbytes))
    return len(keys)


def _check(backend: StorageBackend, keys: Sequence[str], nbytes: int) -> object:
    verdicts = []
    for key in keys:
        value = backend.get(key)
        verdicts.append("miss" if value is None else difference(key, nbytes, value) or "hit")
    return verdicts


class _Answers:
    """Lines of JSON on what was standard output; a backend that prints goes to standard error."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def give(self, result: object) -> None:
        self._line({"result": result})

    def attempt(self, call: Callable[[], object]) -> object:
        """What ``call`` returns; an error of the backend is told, and None returned."""
        try:
            return call()
        except Exception as error:  # a stranger's code may raise anything: told to the parent
            self._line({"error": masked_text(f"{type(error).__name__}: {error}")})
            return None

    def _line(self, answer: dict[str, object]) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()


def _opened(recipe: Recipe) -> StorageBackend:
    backend = recipe.make()
    backend.open()
    return backend


def main() -> None:
    """Opens the backend that the first line describes, then answers questions until the end."""
    answers = _Answers()
    first = sys.stdin.readline()
    backend = answers.attempt(lambda: _opened(Recipe.from_json(first)))
    if not isinstance(backend, StorageBackend):
        return
    answers.give("ready")
    for line in sys.stdin:
        question = json.loads(line)
        keys, nbytes = question["keys"], question["nbytes"]
        if question["what"] == "begin":
            values = [content(key, nbytes) for key in keys]
            answers.give("begun")
            for key, value in zip(keys, values, strict=True):
                backend.set(key, value)
            continue
        do = {"put": _put, "check": _check}[question["what"]]
        result = answers.attempt(partial(do, backend, keys, nbytes))
        if result is not None:
            answers.give(result)
    backend.close()


if __name__ == "__main__":
    main()
