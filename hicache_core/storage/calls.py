"""Counts the calls of an open backend, so that closing or reopening it waits for the last one."""

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
"""How long ``close`` waits for calls that run in other threads."""

CHECK_INTERVAL_S = 0.5
"""How often a call checks that the store is still usable. After an error the next call checks."""

_CALM_TIMEOUT_S = 1.0


class Openable(Protocol):
    """What ``Calls`` opens and lends to calls."""

    def trouble(self) -> str:
        """Returns why it has become unusable while open; empty if it is usable. Fast."""
        ...

    def close(self) -> None:
        """Releases everything."""
        ...


T = TypeVar("T", bound=Openable)


class Calls(Generic[T]):
    """Lends what ``opener`` opened to the calls of a backend.

    When it has lost its files or is damaged, the next call closes and reopens it. Calls that arrive
    meanwhile, or while other calls still use the old one, raise ``BackendUnavailable``.

    Threads: every method may be called from any thread.

    Attributes:
        lock: protects the counters of the backend.
        last_trouble: why it was last reopened; empty if it never was.
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
        """Opens it unless it is open; returns whether it did."""
        if self._is_open:
            return False
        self._value = self._opener()
        self._pid, self._trouble, self._is_open = os.getpid(), "", True
        return True

    def close(self) -> bool:
        """Closes it once no call uses it any more.

        Returns:
            Whether this call closed it. If a call has not ended after ``CLOSE_TIMEOUT_S`` it stays
            open.
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
            # Its claims last until this process ends: the call may still write to them.
            logger.warning("%s: a call still runs; its files stay open", self._name)
            return False
        if value is not None:
            value.close()
        return True

    def call(self) -> _Call[T]:
        """Returns a context manager that yields what is open; it stays open until the block ends.

        Entering raises:
            UseAfterClose: it is not open, or another process opened it.
            BackendUnavailable: it has become unusable and cannot be reopened now.
        """
        return _Call(self)

    def enter(self) -> T:
        """Begins a call: returns what is open and usable. Raises as ``call``."""
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
            # Not under the lock: a file system that hangs must not block ``close``.
            trouble = value.trouble()
            if not trouble:
                return value
            self.leave()
            with self.lock:
                if self._value is value:
                    self._trouble = trouble

    def leave(self, error: BaseException | None = None) -> None:
        """Ends a call that ``enter`` began.

        Args:
            error: what the call raised; after a ``BackendError`` the next call checks the store.
        """
        with self.lock:
            self._n_calls -= 1
            if error is not None and isinstance(error, BackendError):
                self._check_at = 0.0  # it may have become unusable
            if not self._n_calls:
                self._changed.notify_all()

    def _raise_closed(self) -> NoReturn:
        if not self._is_open:
            raise UseAfterClose(f"{self._name} is not open")
        raise UseAfterClose(
            f"{self._name} was opened in process {self._pid}; open another one in this process"
        )

    def _reopen(self) -> None:
        """Closes what is unusable and reopens it. Releases the caller's lock meanwhile."""
        if self._is_reopening or not self._changed.wait_for(self._is_calm, _CALM_TIMEOUT_S):
            raise BackendUnavailable(f"{self._name}: {self._trouble}; it is being reopened")
        if self._value is not None and not self._trouble:
            return  # another call has reopened it
        self._is_reopening = True
        old, self._value = self._value, None
        self.lock.release()
        value = None
        try:
            logger.warning("%s: %s; reopening it", self._name, self._trouble)
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
            self._raise_closed()  # ``close`` waits for this, and then closes the new one

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
