"""The owner of an object: the one thread that may call it. Calls of other threads raise."""

from __future__ import annotations

import os
import threading
import weakref
from threading import get_ident

from hicache_core.errors import WrongThread

_NOBODY = 0  # no thread has this number
_taking = threading.Lock()


class Owner:
    """The owner is the thread that first calls ``check``, as long as that thread lives.

    A forked child cannot own it, since the worker threads belong to the parent.
    """

    def __init__(self, what: str) -> None:
        """Has no owner yet; ``what`` is the name of the object in messages."""
        self._what = what
        self._ident = _NOBODY
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        _owners.add(self)

    def check(self) -> None:
        """Returns if the calling thread is the owner; the first caller becomes the owner.

        Raises:
            WrongThread: the caller is another thread, or a forked child.
        """
        if get_ident() != self._ident:
            self._take()

    @property
    def is_forked(self) -> bool:
        """Whether this is a child, forked since the object was made."""
        return self._pid != os.getpid()

    def hand_over(self) -> None:
        """Makes the next thread that calls ``check`` the owner.

        Raises:
            WrongThread: the caller does not own it.
        """
        self.check()
        self._thread, self._ident = None, _NOBODY

    def _take(self) -> None:
        if self.is_forked:
            raise WrongThread(
                f"{self._what} was opened before this process was forked, and its threads are the "
                f"parent's (pid {self._pid}): open another one here"
            )
        caller = threading.current_thread()
        with _taking:
            if self._thread is not None and self._thread.is_alive():
                raise WrongThread(
                    f"{self._what} belongs to thread {self._thread.name!r}, and {caller.name!r} "
                    "calls it: call it from one thread only (an executor with one worker; "
                    "hand_over lets another thread have it)"
                )
            self._thread, self._ident = caller, get_ident()


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def _forked() -> None:
    """In the child, whose thread has the number of the one that forked."""
    global _taking  # noqa: PLW0603  # its holder may be a thread that is not here
    _taking = threading.Lock()
    for owner in list(_owners):
        owner._ident = _NOBODY


os.register_at_fork(after_in_child=_forked)
