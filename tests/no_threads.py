"""A system that has no threads left, as far as threads of one name are concerned."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def no_threads(name: str) -> Iterator[None]:
    """No thread whose name begins with ``name`` starts inside; the error is Python's own."""
    start = threading.Thread.start

    def failing(thread: threading.Thread) -> None:
        if thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", failing)
        yield
