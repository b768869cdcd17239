"""Room: the state of one transfer on one side, until its single notice."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

from hicache_core.errors import HiCacheError, TransferError
from hicache_core.kv_transfer.base import Notice, TransferState
from hicache_core.kv_transfer.wire import Connection

log = logging.getLogger(__name__)

N_REMEMBERED = 4096


class PastRooms(OrderedDict[int, str]):
    """The last rooms that ended in some way, and why; the oldest are forgotten."""

    def remember(self, room: int, why: str) -> None:
        """Keeps ``room``."""
        self[room] = why
        while len(self) > N_REMEMBERED:
            self.popitem(last=False)


class Room:
    """The connections of a room, and how it ends. Every method may be called on any thread.

    The notice comes when the outcome is decided *and* all threads of the room have ended, so that
    its pages are not accessed afterwards.
    """

    def __init__(
        self,
        number: int,
        timeout_s: float,
        clock: Callable[[], float],
        settled: Callable[[Notice], None],
    ) -> None:
        """Starts without connections.

        Args:
            number: of the room.
            timeout_s: seconds until the room fails.
            clock: seconds, increasing.
            settled: called once, with the notice.
        """
        self.number = number
        self.started_at = clock()
        self.deadline = self.started_at + timeout_s
        self.changed = threading.Condition()
        self.nbytes = 0
        self._clock = clock
        self._settled = settled
        self._connections: set[Connection] = set()
        self._n_workers = 0
        self._outcome: TransferState | None = None
        self._error: HiCacheError | None = None
        self._note = b""
        self._told = False

    @property
    def decided(self) -> bool:
        """Whether the outcome of the room is decided."""
        return self._outcome is not None

    @property
    def n_connections(self) -> int:
        """Connections that work for it."""
        with self.changed:
            return len(self._connections)

    def enter(self) -> bool:
        """Registers a thread that works for the room; False if the room has ended."""
        with self.changed:
            if self._outcome is not None:
                return False
            self._n_workers += 1
            return True

    def leave(self) -> None:
        """Unregisters a thread; it no longer accesses pages of the room."""
        with self.changed:
            self._n_workers -= 1
        self._tell()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Fails the room at once if the block raises.

        Raises:
            HiCacheError: the error of the block; other errors become a TransferError.
        """
        try:
            yield
        except HiCacheError as error:
            self.fail(error)
            raise
        except Exception as error:  # whatever it is: the other side must not wait for this room
            log.exception("the transfer of room %d broke", self.number)
            broken = TransferError(f"the transfer broke: {type(error).__name__}: {error}")
            self.fail(broken)
            raise broken from error

    def watch(self, connection: Connection) -> None:
        """Shuts ``connection`` down as soon as the room fails.

        Raises:
            TransferError: it has failed already.
        """
        with self.changed:
            if self._outcome is TransferState.FAILED:
                raise TransferError("the transfer was given up")
            self._connections.add(connection)

    def unwatch(self, connection: Connection) -> None:
        """Forgets it."""
        with self.changed:
            self._connections.discard(connection)

    def count(self, nbytes: int) -> None:
        """Adds bytes of rows that were moved."""
        with self.changed:
            self.nbytes += nbytes

    def succeed(self, outcome: TransferState, note: bytes = b"") -> None:
        """Ends the room as a success, unless it has ended before."""
        self._decide(outcome, note=note)

    def fail(self, error: HiCacheError) -> None:
        """Ends the room as a failure, unless it has ended before; cuts its connections."""
        self._decide(TransferState.FAILED, error=error)

    def _decide(
        self, outcome: TransferState, note: bytes = b"", error: HiCacheError | None = None
    ) -> None:
        with self.changed:
            if self._outcome is not None:
                return
            self._outcome, self._note, self._error = outcome, note, error
            if error is not None:
                for connection in self._connections:
                    connection.shutdown()
            self.changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        with self.changed:
            if self._told or self._outcome is None or self._n_workers:
                return
            self._told = True
            error = self._error
            notice = Notice(
                self.number,
                self._outcome,
                "" if error is None else str(error),
                "" if error is None else type(error).__name__,
                self._note,
                self.nbytes,
                self._clock() - self.started_at,
            )
        self._settled(notice)
