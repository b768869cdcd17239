"""Carrier: how the rows of one layer move from one memory to the other; all else is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hicache_core.errors import TransferError
from hicache_core.kv_transfer.page_memory import PageMemory
from hicache_core.kv_transfer.wire import Connection, Frame


class Carrier(ABC):
    """The part in which transports differ. Called on the threads of many rooms.

    Only the receiver writes into its pages, so a sender that hangs and wakes up later cannot damage
    pages that have another owner by then.
    """

    @abstractmethod
    def open(self, memory: PageMemory) -> None:
        """Registers ``memory``."""

    @abstractmethod
    def close(self) -> None:
        """Unregisters the memory; called when all rooms have ended."""

    @abstractmethod
    def greeting(self, reached_at: str) -> dict[str, Any]:
        """What a receiver must know about this sender, in JSON types.

        ``reached_at`` is the address of this machine to which the receiver connected.
        """

    @abstractmethod
    def send_rows(self, peer: Connection, frame: Frame, segments: Sequence[memoryview]) -> None:
        """Sends a LAYER frame and its rows, or their addresses.

        Args:
            peer: connection to the receiver.
            frame: the frame; its ``nbytes`` is not set yet.
            segments: the rows.
        """

    @abstractmethod
    def receive_rows(
        self,
        peer: Connection,
        frame: Frame,
        segments: Sequence[memoryview],
        greeting: dict[str, Any],
    ) -> None:
        """Fills ``segments`` with the rows that ``frame`` announces.

        Args:
            peer: connection to the sender.
            frame: the LAYER frame that was received.
            segments: where the rows go.
            greeting: what the sender's carrier said in the handshake.

        Raises:
            TransferError: the rows did not come, or have another size.
        """


class InlineCarrier(Carrier):
    """Rows follow the frame in the same stream, from memory and into memory."""

    def open(self, memory: PageMemory) -> None:
        # docstring inherited; sockets need no registration
        pass

    def close(self) -> None:
        # docstring inherited
        pass

    def greeting(self, reached_at: str) -> dict[str, Any]:  # noqa: ARG002 - it is there already
        # docstring inherited
        return {}

    def send_rows(self, peer: Connection, frame: Frame, segments: Sequence[memoryview]) -> None:
        # docstring inherited
        nbytes = sum(segment.nbytes for segment in segments)
        peer.send(replace(frame, nbytes=nbytes), segments)

    def receive_rows(
        self,
        peer: Connection,
        frame: Frame,
        segments: Sequence[memoryview],
        greeting: dict[str, Any],  # noqa: ARG002 - the rows are in the stream
    ) -> None:
        # docstring inherited
        wanted = sum(segment.nbytes for segment in segments)
        if frame.nbytes != wanted:
            raise TransferError(f"{peer.peer} sent {frame.nbytes} bytes for rows of {wanted}")
        peer.receive_into(segments)
