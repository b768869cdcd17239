"""The contract of a transfer backend, which moves KV rows from pages of a prefill node into pages
of a decode node."""

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
    """What a transfer backend knows about the process that uses it.

    Attributes:
        memory: the pages of this rank, in memory that the CPU can address.
        rank: index of this process among the ranks of one model.
        world_size: number of ranks.
        on_notice: called from any thread when ``poll`` has a new notice; must not block.
    """

    memory: PageMemory
    rank: int = 0
    world_size: int = 1
    on_notice: Callable[[], None] = lambda: None


class TransferState(enum.Enum):
    """How the transfer of a room ended on this side."""

    ARRIVED = "arrived"  # every row is in the pages, and its checksum was right
    SENT = "sent"  # every receiver has confirmed it
    FAILED = "failed"  # the rows must not be used


@dataclass(frozen=True, slots=True)
class Notice:
    """The end of one room on one side; there is exactly one for each ``offer`` and ``receive``.

    After the notice, the backend neither reads nor writes the pages of the room.

    Attributes:
        room: the number that identifies the request on both sides.
        state: how it ended.
        error: what went wrong, in words; empty unless FAILED.
        error_kind: class name of the error; empty unless FAILED.
        note: what the sender gave to ``finish``; empty unless ARRIVED.
        nbytes: bytes of rows that were moved.
        elapsed_s: seconds since ``offer`` or ``receive``.
    """

    room: int
    state: TransferState
    error: str = ""
    error_kind: str = ""
    note: bytes = b""
    nbytes: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class UnitRows:
    """The rows of a group of layers that a receiver lacks.

    Attributes:
        pages: ids in the group's memory of the pages of tokens 0 to stop, in order; those before
            start are not used. Of a state, the one unit.
        tokens: (start, stop) of the rows; of a state (0, 1).
    """

    pages: Sequence[int]
    tokens: tuple[int, int]


class KvTransferBackend(ABC):
    """Moves the KV of requests between the page memories of two nodes, layer by layer.

    A request has a *room*, a number that both sides know. The prefill node offers its pages under
    this number and reports, layer by layer, which tokens are computed. The decode node receives the
    tokens that it lacks into pages of its own. Either side may come first and waits for the other.

    ::

        prefill                                     decode
        offer(room, n_tokens, …)                    receive(room, addresses, pages, tokens, …)
        send(room, pages, layer 0, 0, 512) ──→
        send(room, pages, layer 1, 0, 512) ──→
        …
        finish(room, note)                 ──→      poll() → ARRIVED, note
        poll() → SENT

    Threads: the owner of the pages calls all methods. Only ``close`` may wait for a peer. Each room
    ends with exactly one notice within its ``timeout_s``, even if the peer dies, hangs, restarts or
    serves another model.

    Until the notice of a room, the caller keeps its pages allocated and does not change rows that
    it has sent.
    """

    name: ClassVar[str]
    """Entry-point name and the value of ``--disaggregation-transfer-backend``."""
    api_version: ClassVar[int] = API_VERSION
    """The version of this contract that the class was written for."""
    moves_groups: bool = False
    """Whether ``send`` and ``receive`` take rows of groups of layers."""
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
            TransferError: there is no address or device to listen on.
        """

    @abstractmethod
    def close(self, timeout_s: float = 5.0) -> None:
        """Ends all rooms (FAILED) and all threads within about ``timeout_s``; idempotent.

        Afterwards the page memory may be freed; ``poll`` still returns the last notices.
        """

    @property
    @abstractmethod
    def address(self) -> str:
        """The address where peers reach this rank, ``host:port``; known after ``open``."""

    @property
    def fault(self) -> str:
        """Why peers cannot reach this rank at the moment; empty while they can. Any thread."""
        return ""

    @property
    def n_connections(self) -> int | None:
        """Number of open connections to peers; None if the backend does not count. Any thread."""
        return None

    @abstractmethod
    def introduce(self, addresses: Sequence[str]) -> None:
        """Takes the addresses of all ranks of this node, by rank. Called once, after ``open``.

        A receiver that knows the address of one rank learns the others from it.
        """

    @abstractmethod
    def offer(self, room: int, n_tokens: int, timeout_s: float) -> None:
        """Offers the rows of ``n_tokens`` tokens to the receivers of a room; returns at once.

        Args:
            room: number of the request, below 2**63.
            n_tokens: length of the prompt.
            timeout_s: the room fails if some receiver lacks rows by then.

        Raises:
            TransferError: the number is in use.
        """

    @abstractmethod
    def send(
        self,
        room: int,
        pages: Sequence[int],
        layer: int,
        start: int,
        stop: int,
        group: int | None = None,
    ) -> None:
        """Declares rows [start, stop) of ``layer`` final, so that receivers may have them.

        Returns at once. The ranges of a layer follow each other without a gap. A call for a room
        that has ended does nothing.

        Args:
            room: number of the request.
            pages: ids of the pages of tokens 0 to stop, in order.
            layer: index among the layers in memory.
            start: position of the first token; of a state 0.
            stop: position after the last token; of a state 1.
            group: index of the group of layers whose rows these are, in units of its memory; None
                for those of full pages. Only for a backend that ``moves_groups``.
        """

    @abstractmethod
    def finish(self, room: int, note: bytes) -> None:
        """Ends the sending of a room; every receiver gets ``note``, at most 64 KiB."""

    @abstractmethod
    def receive(
        self,
        room: int,
        addresses: Sequence[str],
        pages: Sequence[int],
        tokens: tuple[int, int],
        timeout_s: float,
        groups: Sequence[UnitRows] = (),
    ) -> None:
        """Fetches rows [start, stop) of a request into ``pages``; returns at once.

        Args:
            room: number of the request.
            addresses: of all ranks of the prefill node, or of one that knows the others. They
                tell which rank has which heads.
            pages: ids of the pages of tokens 0 to stop; rows before start are not written.
            tokens: (start, stop); start is the length of the prefix that is here already.
            timeout_s: the room fails if rows are missing by then.
            groups: for each group of layers, in the order of the spec, the rows to fetch. Only for
                a backend that ``moves_groups``.

        Raises:
            TransferError: the number is in use.
        """

    @abstractmethod
    def cancel(self, room: int, reason: str) -> None:
        """Gives up a room, as sender or receiver; its notice (FAILED) follows.

        Args:
            room: number of the request; an unknown one is ignored.
            reason: for the peer and for the notice.
        """

    @abstractmethod
    def poll(self) -> list[Notice]:
        """Notices of the rooms that ended since the last call; fails rooms that are overdue."""
