"""Calls with a time limit: a backend that hangs must not hang the kit."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Hung(AssertionError):
    """A call did not return in time; the message shows where it hangs."""


class Call(Generic[T]):
    """A function that runs on a thread of its own.

    The thread is a daemon: if it hangs in a backend, nothing can end it.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        """Starts the thread."""
        self._function = function
        self._future: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, name="conformance", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            value = self._function()
        except BaseException as error:  # a stranger's code may raise anything: handed on as it is
            self._future.set_exception(error)
        else:
            self._future.set_result(value)

    def result(self, bound_s: float, what: str) -> T:
        """Returns what the function returned, or raises what it raised.

        Args:
            bound_s: seconds to wait.
            what: the function in words, for the message.

        Raises:
            Hung: it did not return within ``bound_s``.
        """
        self._thread.join(bound_s)
        if self._thread.is_alive():
            raise Hung(f"{what} did not come back within {bound_s:g} s{self._where()}")
        return self._future.result()

    def _where(self) -> str:
        """Where the thread is, innermost call last."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is None:
            return ""
        calls = traceback.extract_stack(frame)[-3:]
        return "; it hangs in " + " > ".join(f"{c.name} ({c.filename}:{c.lineno})" for c in calls)


def bounded(function: Callable[[], T], bound_s: float, what: str) -> T:
    """Calls ``function`` on a thread of its own and waits for at most ``bound_s``.

    Args:
        function: what to call; if it hangs, its thread is left behind.
        bound_s: seconds.
        what: names the call in the message.

    Returns:
        What ``function`` returns.

    Raises:
        Hung: it takes longer.
    """
    return Call(function).result(bound_s, what)
