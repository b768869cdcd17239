"""The receivers that are connected to a sender, and limits on their number."""

from __future__ import annotations

import threading

from hicache_core.errors import TransferError
from hicache_core.kv_transfer.wire import Connection


class Callers:
    """Counts connections: strangers before their handshake, guests after it. Any thread.

    There may be ``limit`` of each. If there are too many strangers, a new one replaces the oldest,
    so that silent connections cannot keep others out.
    """

    def __init__(self, limit: int) -> None:
        """No connections yet."""
        self._limit = limit
        self._lock = threading.Lock()
        self._strangers: dict[Connection, None] = {}  # in the order in which they came
        self._guests: set[Connection] = set()

    def __len__(self) -> int:
        with self._lock:
            return len(self._strangers) + len(self._guests)

    def enter(self, stranger: Connection) -> None:
        """Adds a new connection, as a stranger."""
        with self._lock:
            if len(self._strangers) >= self._limit:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.shutdown()
            self._strangers[stranger] = None

    def admit(self, stranger: Connection) -> None:
        """Makes a stranger a guest, after its handshake.

        Raises:
            TransferError: there are too many guests.
        """
        with self._lock:
            if stranger not in self._strangers:
                raise TransferError(f"{stranger.peer} was too slow, and others came")
            if len(self._guests) >= self._limit:
                raise TransferError(f"{len(self._guests)} receivers are served; no more may come")
            del self._strangers[stranger]
            self._guests.add(stranger)

    def leave(self, caller: Connection) -> None:
        """Removes a connection that has ended."""
        with self._lock:
            self._strangers.pop(caller, None)
            self._guests.discard(caller)

    def shutdown(self) -> None:
        """Cuts all connections."""
        with self._lock:
            for caller in [*self._strangers, *self._guests]:
                caller.shutdown()
