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
    """The rooms that ended last, each with the reason; the oldest are forgotten."""

    def remember(self, room: int, why: str) -> None:
        """Keeps ``room``."""
        self[room] = why
        while len(self) > N_REMEMBERED:
            self.popitem(last=False)


class Room:
    """The connections of a room, and its outcome. Any thread.

    The notice comes once the outcome is decided *and* no thread works for the room any more, so
    that no thread touches its pages afterwards.
    """

    def __init__(
        self,
        number: int,
        timeout_s: float,
        clock: Callable[[], float],
        settled: Callable[[Notice], None],
    ) -> None:
        """Not decided yet.

        Args:
            number: of the room.
            timeout_s: the room fails when this time is over.
            clock: seconds, monotonic.
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
        """Whether the outcome is decided."""
        return self._outcome is not None

    @property
    def n_connections(self) -> int:
        """Number of connections that work for the room."""
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
        """Unregisters a thread, which must not touch pages of the room afterwards."""
        with self.changed:
            self._n_workers -= 1
        self._tell()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """An exception inside the block fails the room at once.

        Raises:
            HiCacheError: the exception; TransferError for an unexpected one.
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
            TransferError: the room has failed already.
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
        """Adds ``nbytes`` of rows to the count."""
        with self.changed:
            self.nbytes += nbytes

    def succeed(self, outcome: TransferState, note: bytes = b"") -> None:
        """Decides that the room succeeds, unless it is decided already."""
        self._decide(outcome, note=note)

    def fail(self, error: HiCacheError) -> None:
        """Decides that the room fails, unless it is decided already; shuts its connections down."""
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
