"""The contract of a transfer backend: KV rows from a prefill node's pages into a decode node's."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from hicache_core.kv_transfer.page_memory import PageMemory

API_VERSION = 1


class TransferConfig(BaseModel):
    """Base of a transfer backend's own settings: frozen, an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class TransferContext:
    """What a transfer backend may know of the process that uses it.

    Attributes:
        memory: the pages of this rank, in memory that the CPU reaches.
        rank: this process among those that hold one model together.
        world_size: how many those are.
        on_notice: called from any thread when ``poll`` has something new; must not block.
    """

    memory: PageMemory
    rank: int = 0
    world_size: int = 1
    on_notice: Callable[[], None] = lambda: None


class TransferState(enum.Enum):
    """How the transfer of a room ended on this side."""

    ARRIVED = "arrived"  # every row is in the pages, and its checksum was right
    SENT = "sent"  # every receiver has confirmed it
    FAILED = "failed"  # the rows count for nothing


@dataclass(frozen=True, slots=True)
class Notice:
    """The end of one room on one side; there is exactly one for each ``offer`` and ``receive``.

    From the notice on, the pages of the room are neither read nor written by the backend.

    Attributes:
        room: the number that names the request on both sides.
        state: how it ended.
        error: what went wrong, in words; empty unless FAILED.
        error_kind: class name of the error; empty likewise.
        note: what the sender gave to ``finish``; empty unless ARRIVED.
        nbytes: bytes of rows that were moved.
        elapsed_s: from ``offer`` or ``receive`` on.
    """

    room: int
    state: TransferState
    error: str = ""
    error_kind: str = ""
    note: bytes = b""
    nbytes: int = 0
    elapsed_s: float = 0.0


class KvTransferBackend(ABC):
    """Moves the KV of requests between the page memories of two nodes, layer by layer.

    A request has a *room*, a number that both sides were told. The prefill node offers its pages in
    the room and says of each layer which tokens are computed; the decode node receives what it
    lacks into pages of its own. Who comes first waits for the other.

    ::

        prefill                                     decode
        offer(room, n_tokens, …)                    receive(room, addresses, pages, tokens, …)
        send(room, pages, layer 0, 0, 512) ──→
        send(room, pages, layer 1, 0, 512) ──→
        …
        finish(room, note)                 ──→      poll() → ARRIVED, note
        poll() → SENT

    Threads: all methods are called by one thread, the owner of the pages, and none of them waits
    for a peer, but for ``close``. Each room ends with one notice within its time, whatever the peer
    does: dies, hangs, restarts, or was another model all along.

    Pages that a room names stay allocated, and rows that were sent unchanged, until its notice.
    """

    name: ClassVar[str]
    """Entry-point name and the value of ``--disaggregation-transfer-backend``."""
    api_version: ClassVar[int] = API_VERSION
    """The version of this contract that the class was written for."""
    Config: ClassVar[type[TransferConfig]] = TransferConfig
    """This backend's settings."""

    def __init__(self, config: TransferConfig, context: TransferContext) -> None:
        """Keeps its arguments; listens to nothing and allocates nothing (``open`` does)."""
        self.config = config
        self.context = context

    @abstractmethod
    def open(self) -> None:
        """Registers the page memory and starts to listen.

        Raises:
            TransferError: no address or device to listen on.
        """

    @abstractmethod
    def close(self, timeout_s: float = 5.0) -> None:
        """Ends all rooms (FAILED) and all threads; a second call does nothing.

        Afterwards the page memory may be freed, and ``poll`` still gives the last notices.
        """

    @property
    @abstractmethod
    def address(self) -> str:
        """Where peers reach this rank, ``host:port``; known from ``open`` on."""

    @property
    def fault(self) -> str:
        """Why peers cannot reach this rank at the moment; empty while they can. Any thread."""
        return ""

    @property
    def n_connections(self) -> int | None:
        """Open connections to peers; None if nobody counts them. Any thread."""
        return None

    @abstractmethod
    def introduce(self, addresses: Sequence[str]) -> None:
        """Says where all ranks of this node are, by rank; called once, after ``open``.

        Receivers that know only one of them are told the others.
        """

    @abstractmethod
    def offer(self, room: int, n_tokens: int, timeout_s: float) -> None:
        """Promises the rows of ``n_tokens`` tokens to whoever comes for the room.

        Args:
            room: below 2**63.
            n_tokens: how many.
            timeout_s: FAILED if not all receivers have everything by then.

        Raises:
            TransferError: the room is taken.
        """

    @abstractmethod
    def send(self, room: int, pages: Sequence[int], layer: int, start: int, stop: int) -> None:
        """Rows [start, stop) of ``layer`` are final; they go when a receiver wants them.

        Ranges of a layer follow each other without a gap. Nothing happens once the room has ended.

        Args:
            room: the request's.
            pages: of tokens 0 to stop, in order; kept as they are.
            layer: index among the layers that are held.
            start: first token of the request.
            stop: behind the last.
        """

    @abstractmethod
    def finish(self, room: int, note: bytes) -> None:
        """All layers were sent; ``note`` (at most 64 KiB) is handed to every receiver."""

    @abstractmethod
    def receive(
        self,
        room: int,
        addresses: Sequence[str],
        pages: Sequence[int],
        tokens: tuple[int, int],
        timeout_s: float,
    ) -> None:
        """Fetches rows [start, stop) of a request into ``pages``; returns at once.

        Args:
            room: the request's.
            addresses: of all ranks of the prefill node, or of one that was introduced to the
                others; whose heads are asked for is worked out with them.
            pages: of tokens 0 to stop; those before start are not touched.
            tokens: (start, stop); a receiver that has a prefix already begins behind it.
            timeout_s: FAILED if not everything has arrived by then.

        Raises:
            TransferError: the room is taken.
        """

    @abstractmethod
    def cancel(self, room: int, reason: str) -> None:
        """Gives up a room, as sender or receiver; its notice (FAILED) follows. Unknown: nothing."""

    @abstractmethod
    def poll(self) -> list[Notice]:
        """The rooms that have ended since the last call; fails those whose time is over."""
