"""The contract of the data path: bytes between slots and memory, many at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple


class Transfer(NamedTuple):
    """A range of a file, and the memory to read it into or write it from."""

    fd: int
    offset: int
    nbytes: int
    buffers: list[memoryview]


class PageIO(ABC):
    """Moves bytes between slots and memory. Several threads may call ``read`` and ``write``."""

    mode: ClassVar[str]
    """As in the configuration."""

    def open(self) -> None:  # noqa: B027 - the POSIX mode has nothing to open
        """Allocates what it needs."""

    @abstractmethod
    def close(self) -> None:
        """Releases it; no call is running, and every file was removed."""

    def add_file(self, fd: int) -> None:  # noqa: B027 - POSIX files need no registration
        """Announces a descriptor that was just opened."""

    def remove_file(self, fd: int) -> None:  # noqa: B027 - see above
        """Withdraws a descriptor; called before it is closed."""

    @abstractmethod
    def read(
        self, transfers: Sequence[Transfer], deadline: float, arrived: Callable[[int], bool]
    ) -> list[int]:
        """Fills the memory of each transfer.

        Args:
            transfers: what to read.
            deadline: by ``time.monotonic``; what ends later does not count.
            arrived: called with the index of each transfer that was read, on any thread and while
                the bytes are in its cache; returns whether they are right.

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
        """Writes the memory of each transfer.

        Args:
            transfers: what to write.
            deadline: by ``time.monotonic``; nothing is begun after it.
            leaving: called with the index of each transfer before it is written, on any thread.

        Returns:
            As ``read``.

        Raises:
            BackendTimeout: the file system does not answer.
        """
