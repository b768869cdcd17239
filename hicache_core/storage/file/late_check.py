"""The part of checking a large index that goes on after it was opened."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable

from hicache_core.errors import BackendCorrupt, BackendError
from hicache_core.storage.sqlite import Database

logger = logging.getLogger(__name__)

_POLL_S = 0.05


class LateCheck:
    """Checks a database on a thread and a connection of its own.

    Meanwhile the index is in use. Its faults can lose an object or reuse its space too early, but
    give no wrong bytes: each record names its key, and its generation.
    """

    def __init__(
        self, database: Database, connection: sqlite3.Connection, damaged: Callable[[], None]
    ) -> None:
        """Begins.

        Args:
            database: to be checked.
            connection: to it, which nothing else uses and ``close`` closes.
            damaged: called on the thread if it is damaged.
        """
        self._database = database
        self._connection = connection
        self._damaged = damaged
        self._thread = threading.Thread(target=self._run, name="hicache-file-check")
        self._thread.start()

    def join(self) -> None:
        """Blocks until it has ended."""
        self._thread.join()

    def close(self) -> None:
        """Breaks it off, and joins its thread."""
        while self._thread.is_alive():  # a statement that begins after the call is not broken off
            self._connection.interrupt()
            self._thread.join(_POLL_S)
        self._connection.close()

    def _run(self) -> None:
        try:
            with self._database.translated(self._damaged):
                self._database.check(self._connection)
        except BackendCorrupt as exc:
            logger.warning("%s; the next call reopens it", exc)
        except BackendError:
            pass  # it was broken off, or cannot be read: then calls will say so
