"""The calls of an open backend: closing, and opening anew, waits until the last one has ended."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Generic, NoReturn, Protocol, TypeVar

from hicache_core.errors import BackendError, BackendUnavailable, UseAfterClose

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
"""``close`` waits so long for calls that other threads are still in."""

CHECK_INTERVAL_S = 0.5
"""How often a call looks whether the store is still what it was; after an error the next does."""

_CALM_TIMEOUT_S = 1.0


class Openable(Protocol):
    """What the calls of a backend use."""

    def trouble(self) -> str:
        """Why it is of no use any more, though it is open; empty if it is well. Quick."""
        ...

    def close(self) -> None:
        """Releases everything."""
        ...


T = TypeVar("T", bound=Openable)


class Calls(Generic[T]):
    """Lends what ``opener`` opened to the calls of a backend.

    What has lost its files or is damaged is closed and opened anew by the next call. Calls that
    come while that goes on, or while others are still in it, get ``BackendUnavailable``.

    Threads: every method may be called from any thread.

    Attributes:
        lock: guards what the backend counts.
        last_trouble: why it was last opened anew; empty if it never was.
    """

    def __init__(self, name: str, opener: Callable[[], T]) -> None:
        self.lock = threading.Lock()
        self.last_trouble = ""
        self._name = name
        self._opener = opener
        self._changed = threading.Condition(self.lock)
        self._n_calls = 0
        self._pid = 0
        self._is_open = False
        self._value: T | None = None
        self._trouble = ""
        self._check_at = 0.0
        self._is_reopening = False

    def open(self) -> bool:
        """Opens it, unless it is open; whether it did."""
        if self._is_open:
            return False
        self._value = self._opener()
        self._pid, self._trouble, self._is_open = os.getpid(), "", True
        return True

    def close(self) -> bool:
        """Closes it when no call is in it any more.

        Returns:
            Whether this was the call that closed it. What some call never leaves stays open.
        """
        with self._changed:
            if not self._is_open:
                return False
            self._is_open = False
            if self._pid != os.getpid():
                self._value = None
                return False  # what a forked child inherited is its parent's to close
            is_calm = self._changed.wait_for(self._is_calm, CLOSE_TIMEOUT_S)
            value, self._value = self._value, None
        if not is_calm:
            # What it has claimed stays claimed until this process ends: it may still be written.
            logger.warning("%s: a call still runs; its files stay open", self._name)
            return False
        if value is not None:
            value.close()
        return True

    def call(self) -> _Call[T]:
        """A context manager that gives what is open; it is not closed before the block has ended.

        It raises on entering:
            UseAfterClose: it is not open, or was opened by another process.
            BackendUnavailable: it is of no use any more, and cannot be opened anew now.
        """
        return _Call(self)

    def enter(self) -> T:
        """What is open and well; one call more is in it."""
        while True:
            with self.lock:
                if not self._is_open or self._pid != os.getpid():
                    self._raise_closed()
                if self._value is None or self._trouble:
                    self._reopen()
                value = self._value
                assert value is not None
                self._n_calls += 1
                now = time.monotonic()
                if now < self._check_at:
                    return value
                self._check_at = now + CHECK_INTERVAL_S
            # Not under the lock: a file system that hangs must not hang those who close.
            trouble = value.trouble()
            if not trouble:
                return value
            self.leave()
            with self.lock:
                if self._value is value:
                    self._trouble = trouble

    def leave(self, error: BaseException | None = None) -> None:
        """Ends a call that was entered."""
        with self.lock:
            self._n_calls -= 1
            if error is not None and isinstance(error, BackendError):
                self._check_at = 0.0  # perhaps it is of no use any more
            if not self._n_calls:
                self._changed.notify_all()

    def _raise_closed(self) -> NoReturn:
        if not self._is_open:
            raise UseAfterClose(f"{self._name} is not open")
        raise UseAfterClose(
            f"{self._name} was opened in process {self._pid}; a forked child has to open one of "
            "its own"
        )

    def _reopen(self) -> None:
        """Closes what is of no use and opens it anew. Holds the lock, but not while it does so."""
        if self._is_reopening or not self._changed.wait_for(self._is_calm, _CALM_TIMEOUT_S):
            raise BackendUnavailable(f"{self._name}: {self._trouble}; it is being opened anew")
        if self._value is not None and not self._trouble:
            return  # another call was faster
        self._is_reopening = True
        old, self._value = self._value, None
        self.lock.release()
        value = None
        try:
            logger.warning("%s: %s; opening it anew", self._name, self._trouble)
            if old is not None:
                old.close()
            value = self._opener()
        finally:
            self.lock.acquire()
            self._value, self._is_reopening = value, False
            if value is not None:
                self.last_trouble, self._trouble = self._trouble, ""
            self._changed.notify_all()
        if not self._is_open:
            self._raise_closed()  # ``close`` waits for the end of this, and then closes the new one

    def _is_calm(self) -> bool:
        return not self._n_calls and not self._is_reopening


class _Call(Generic[T]):
    """One call, as a context manager."""

    __slots__ = ("_calls",)

    def __init__(self, calls: Calls[T]) -> None:
        self._calls = calls

    def __enter__(self) -> T:
        return self._calls.enter()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._calls.leave(error)
