"""The contract of the data path: bytes between slots and memory, many at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple


class Transfer(NamedTuple):
    """One stretch of a file and the memory that it is read into or written from, in order."""

    fd: int
    offset: int
    nbytes: int
    buffers: list[memoryview]


class PageIO(ABC):
    """Moves bytes. Threads: ``read`` and ``write`` may be called from several at once."""

    mode: ClassVar[str]
    """As in the configuration."""

    def open(self) -> None:  # noqa: B027 - the POSIX mode has nothing to open
        """Allocates what it needs."""

    @abstractmethod
    def close(self) -> None:
        """Releases it; no call is under way, and every file was removed."""

    def add_file(self, fd: int) -> None:  # noqa: B027 - POSIX files need no registration
        """Announces a descriptor that was just opened."""

    def remove_file(self, fd: int) -> None:  # noqa: B027 - see above
        """Takes it back; called before the descriptor is closed."""

    @abstractmethod
    def read(
        self, transfers: Sequence[Transfer], deadline: float, arrived: Callable[[int], bool]
    ) -> list[int]:
        """Fills the memory of each transfer.

        Args:
            transfers: what to read.
            deadline: by ``time.monotonic``; what ends later is no result any more.
            arrived: called with the number of each transfer that is filled, from any thread and
                while the bytes are in its cache; says whether they are what they should be.

        Returns:
            For each transfer the bytes that were read, fewer at the end of the file, or a negative
            errno: ``-ETIME`` if it ended after the deadline, ``-EBADMSG`` if ``arrived`` said no.

        Raises:
            BackendTimeout: the file system does not answer.
        """

    @abstractmethod
    def write(
        self, transfers: Sequence[Transfer], deadline: float, leaving: Callable[[int], None]
    ) -> list[int]:
        """Writes the memory of each transfer; ``leaving`` is called before each.

        Arguments, results and errors as for ``read``; nothing is begun after the deadline.
        """
