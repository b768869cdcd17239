"""Large calls in parts, which the threads of a store run at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from hicache_core.integrations.foreign.store import Answer, OnDone
from hicache_core.storage.segments import nbytes_of
from hicache_core.types import Page

PART_NBYTES = 8 << 20
"""A part has at least so many bytes: less is not worth a thread."""

Submit: TypeAlias = Callable[[Sequence[str], Sequence[Page], OnDone], None]
"""``submit_read`` or ``submit_write`` of a ``ForeignStore``."""


class _Joined:
    """Makes one answer of the answers of all parts. Any thread."""

    def __init__(self, n_parts: int, on_done: OnDone) -> None:
        self._on_done = on_done
        self._lock = threading.Lock()
        self._answers: dict[int, Answer] = {}
        self._n_parts = n_parts

    def put(self, part: int, answer: Answer) -> None:
        """Takes the answer of a part; the last one calls ``on_done``."""
        with self._lock:
            self._answers[part] = answer
            if len(self._answers) < self._n_parts:
                return
        answers = [self._answers[n] for n in range(self._n_parts)]
        mask = [yes for answer in answers for yes in answer.mask]
        error = next((answer.error for answer in answers if answer.error), "")
        self._on_done(Answer(mask, error, max(answer.elapsed_s for answer in answers)))


def submit_in_parts(
    submit: Submit, keys: Sequence[str], pages: Sequence[Page], on_done: OnDone, *, n_threads: int
) -> None:
    """Submits a read or write, in parts if it is large.

    Args:
        submit: of the store.
        keys: one for each page.
        pages: the engine's memory.
        on_done: called once, when all parts are done.
        n_threads: of the store: there are at most as many parts.
    """
    nbytes = sum(map(nbytes_of, pages))
    n_parts = max(1, min(n_threads, nbytes // PART_NBYTES, len(keys)))
    joined = _Joined(n_parts, on_done)
    ends = [len(keys) * (n + 1) // n_parts for n in range(n_parts)]
    for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        submit(keys[start:end], pages[start:end], partial(joined.put, n))
