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
    """What a transfer backend may know about the process that uses it.

    Attributes:
        memory: the pages of this rank, in memory that the CPU can access.
        rank: number of this process among those that hold one model together.
        world_size: number of these processes.
        on_notice: called on any thread when ``poll`` has something new; must not block.
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

    After the notice, the backend neither reads nor writes the pages of the room.

    Attributes:
        room: the number that identifies the request on both sides.
        state: how it ended.
        error: the failure, in words; empty unless FAILED.
        error_kind: class name of the error; empty unless FAILED.
        note: the bytes that the sender gave to ``finish``; empty unless ARRIVED.
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


class KvTransferBackend(ABC):
    """Moves the KV of requests between the page memories of two nodes, layer by layer.

    A request has a *room*, a number that both sides know. The prefill node offers its pages in the
    room and reports for each layer which tokens are computed. The decode node receives the tokens
    that it lacks into pages of its own. The side that comes first waits for the other.

    ::

        prefill                                     decode
        offer(room, n_tokens, …)                    receive(room, addresses, pages, tokens, …)
        send(room, pages, layer 0, 0, 512) ──→
        send(room, pages, layer 1, 0, 512) ──→
        …
        finish(room, note)                 ──→      poll() → ARRIVED, note
        poll() → SENT

    Threads: one thread, the owner of the pages, calls all methods. Only ``close`` waits for a peer.
    Each room ends with one notice within its time, even if the peer dies, hangs, restarts or has
    another model.

    Until the notice, the pages of a room stay allocated, and rows that were sent do not change.
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
            TransferError: there is no address or device to listen on.
        """

    @abstractmethod
    def close(self, timeout_s: float = 5.0) -> None:
        """Ends all rooms (FAILED) and all threads; a second call does nothing.

        Afterwards the page memory may be freed, and ``poll`` still gives the last notices.
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
        """Open connections to peers; None if they are not counted. Any thread."""
        return None

    @abstractmethod
    def introduce(self, addresses: Sequence[str]) -> None:
        """Takes the addresses of all ranks of this node, by rank; called once, after ``open``.

        Receivers that know only one of them learn the others from it.
        """

    @abstractmethod
    def offer(self, room: int, n_tokens: int, timeout_s: float) -> None:
        """Promises the rows of ``n_tokens`` tokens to the receivers of a room.

        Args:
            room: number of the request, below 2**63.
            n_tokens: tokens of the prompt.
            timeout_s: seconds after which the room is FAILED unless all receivers have everything.

        Raises:
            TransferError: the room is taken.
        """

    @abstractmethod
    def send(self, room: int, pages: Sequence[int], layer: int, start: int, stop: int) -> None:
        """Reports that rows [start, stop) of ``layer`` are final, so that receivers can get them.

        Ranges of a layer follow each other without a gap. Does nothing if the room has ended.

        Args:
            room: number of the request.
            pages: pages of tokens 0 to stop, in order; the caller does not change them.
            layer: index among the layers of this rank.
            start: first token.
            stop: the token after the last one.
        """

    @abstractmethod
    def finish(self, room: int, note: bytes) -> None:
        """Reports that all layers are final; every receiver gets ``note`` (at most 64 KiB)."""

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
            room: number of the request.
            addresses: of all ranks of the prefill node, or of one that was introduced to the
                others; the handshakes decide which rank sends which heads.
            pages: pages of tokens 0 to stop; those before start are not touched.
            tokens: (start, stop); a receiver that has a prefix already begins after it.
            timeout_s: seconds after which the room is FAILED unless everything has arrived.

        Raises:
            TransferError: the room is taken.
        """

    @abstractmethod
    def cancel(self, room: int, reason: str) -> None:
        """Gives up a room, as sender or receiver; its notice (FAILED) follows.

        Does nothing for an unknown room.
        """

    @abstractmethod
    def poll(self) -> list[Notice]:
        """The rooms that have ended since the last call; fails those whose time is over."""
