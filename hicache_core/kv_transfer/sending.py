"""Sending: the prefill side, one thread for each receiver of a room."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hicache_core.errors import HiCacheError, PeerRefused, TransferError
from hicache_core.kv_transfer.base import Notice, TransferState
from hicache_core.kv_transfer.carrier import Carrier
from hicache_core.kv_transfer.handshake import Want, check_hello, wanted_of, welcome_of
from hicache_core.kv_transfer.page_memory import PageMemory
from hicache_core.kv_transfer.room import PastRooms, Room
from hicache_core.kv_transfer.wire import Connection, Frame, Kind, checksum_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows [start, stop) of a layer that are final."""

    pages: Sequence[int]
    layer: int
    start: int
    stop: int


class SendingRoom(Room):
    """A room on the prefill side: records which rows are final so far."""

    def __init__(
        self,
        number: int,
        n_tokens: int,
        timeout_s: float,
        clock: Callable[[], float],
        settled: Callable[[Notice], None],
    ) -> None:
        """No row is final yet.

        Args:
            number: of the room.
            n_tokens: length of the prompt.
            timeout_s: the room fails when this time is over.
            clock: seconds, monotonic.
            settled: called once, with the notice.
        """
        super().__init__(number, timeout_s, clock, settled)
        self.n_tokens = n_tokens
        self._log: list[_Rows] = []
        self._last_words: bytes = b""
        self._finished = False
        self._confirmed: set[int] = set()

    def add(self, pages: Sequence[int], layer: int, start: int, stop: int) -> None:
        """Records that rows [start, stop) of a layer are final.

        Args:
            pages: ids of the pages of tokens 0 to stop.
            layer: number of the layer (``PageMemory.number``).
            start: position of the first token.
            stop: position after the last token.
        """
        with self.changed:
            self._log.append(_Rows(pages, layer, start, stop))
            self.changed.notify_all()

    def finish(self, note: bytes) -> None:
        """Records that all rows are final; ``note`` follows them."""
        with self.changed:
            self._last_words, self._finished = note, True
            self.changed.notify_all()

    def next(self, index: int, timeout_s: float) -> _Rows | bytes | None:
        """Entry ``index`` of the final rows, the note after the last, or None after ``timeout_s``.

        Raises:
            TransferError: the room has failed.
        """
        with self.changed:
            self.changed.wait_for(
                lambda: self.decided or self._finished or index < len(self._log), timeout_s
            )
            if self.decided:
                raise TransferError("the prefill node gave the request up")
            if index < len(self._log):
                return self._log[index]
            return self._last_words if self._finished else None

    def confirm(self, rank: int, n_receivers: int) -> None:
        """Records that receiver ``rank`` of ``n_receivers`` has all rows."""
        with self.changed:
            self._confirmed.add(rank)
            complete = len(self._confirmed) >= n_receivers
        if complete:
            self.succeed(TransferState.SENT)


class Sender:
    """Serves receivers that connect: handshake, wait for the offer, send its layers."""

    def __init__(
        self,
        memory: PageMemory,
        carrier: Carrier,
        find: Callable[[int], SendingRoom | None],
        ping_s: float,
    ) -> None:
        """Serves nothing yet. Notify ``arrived`` when the answer of ``find`` changes.

        Args:
            memory: page memory of this rank.
            carrier: moves the rows.
            find: returns the offer of a room or None; raises TransferError if it has ended.
            ping_s: seconds between two signs of life.
        """
        self._memory = memory
        self._carrier = carrier
        self._find = find
        self._ping_s = ping_s
        self.n_computed = 0  # ranges of rows, of all rooms: that this node gets on
        self.arrived = threading.Condition()
        self.closing = False
        self.others: Sequence[str] = ()  # where the other ranks of this node are
        self.deserted = PastRooms()  # those that nobody waits for, and why

    def serve(self, peer: Connection, admit: Callable[[], None]) -> None:
        """Holds the whole conversation with one receiver; returns when it is over.

        ``admit`` is called after the handshake; it raises TransferError if the node is full.
        """
        room = -1
        try:
            room, hello = peer.receive_json(Kind.HELLO)
            try:
                check_hello(hello, self._memory)
            except PeerRefused as error:
                log.error("refused %s: %s", peer.peer, error)
                self._desert(room, error)
                peer.send_text(Kind.REFUSED, room, str(error).encode())
                return
            welcome = welcome_of(self._memory, self._carrier.greeting(peer.reached_at), self.others)
            peer.send_json(Kind.WELCOME, room, welcome)
            want = wanted_of(peer.receive_json(Kind.WANT)[1], hello, self._memory)
            admit()
            self._send_offer(peer, room, want)
        except HiCacheError as error:
            log.warning("KV of room %d did not reach %s: %s", room, peer.peer, error)
            if room >= 0:
                self._desert(room, error)
                with contextlib.suppress(TransferError):  # it may be gone, or cut off
                    peer.send_text(Kind.FAILED, room, str(error).encode())

    def _desert(self, room: int, error: HiCacheError) -> None:
        """Who wanted the room is lost to it: its offer fails, also one that comes later."""
        with self.arrived, contextlib.suppress(TransferError):  # it has ended already
            offer = self._find(room)
            if offer is not None:
                offer.fail(error)
                return
            self.deserted.remember(room, str(error))
            self.arrived.notify_all()

    def _send_offer(self, peer: Connection, room: int, want: Want) -> None:
        offer = self._wait_for_offer(peer, room)
        if not offer.enter():
            peer.send_text(Kind.FAILED, room, b"the room has ended")
            return
        peer.deadline = offer.deadline
        try:
            with offer.failing():
                offer.watch(peer)
                self._check_range(offer, want)
                self._send_layers(peer, offer, want)
                if peer.receive().kind is not Kind.ACK:
                    raise TransferError(f"{peer.peer} did not confirm what it got")
                offer.confirm(want.rank, want.n_receivers)
        finally:
            offer.unwatch(peer)
            offer.leave()

    def _wait_for_offer(self, peer: Connection, room: int) -> SendingRoom:
        """Pings while the request still waits for its turn on this node."""
        while True:
            with self.arrived:
                self.arrived.wait_for(
                    lambda: self.closing or self._find(room) is not None, self._ping_s
                )
                offer, closing = self._find(room), self.closing
            if closing:
                raise TransferError("the prefill node is closing")
            if offer is not None:
                return offer
            self._ping(peer, room)

    def _ping(self, peer: Connection, room: int) -> None:
        if peer.is_gone():
            raise TransferError(f"{peer.peer} left before everything was sent")
        peer.renew()
        peer.send_json(Kind.PING, room, {"computed": self.n_computed})

    def _check_range(self, offer: SendingRoom, want: Want) -> None:
        if want.stop != offer.n_tokens:
            raise TransferError(
                f"asked for tokens up to {want.stop} of a prompt of {offer.n_tokens}: the two "
                "nodes did not get the same request"
            )

    def _send_layers(self, peer: Connection, offer: SendingRoom, want: Want) -> None:
        index = 0
        while True:
            item = offer.next(index, self._ping_s)
            if item is None:
                self._ping(peer, offer.number)
                continue
            peer.renew()  # what was waited for was the engine
            if isinstance(item, bytes):
                peer.send_text(Kind.END, offer.number, item)
                return
            index += 1
            memory, layer = self._memory.part(item.layer)
            is_full = memory is self._memory
            start = max(item.start, want.start) if is_full else item.start
            if want.heads is None or start >= item.stop:
                continue
            heads = self._memory.heads_in(memory, want.heads)
            segments = memory.segments(layer, item.pages, start, item.stop, heads)
            frame = Frame(
                Kind.LAYER,
                offer.number,
                item.layer,
                start,
                item.stop,
                checksum=checksum_of(segments),
            )
            self._carrier.send_rows(peer, frame, segments)
            offer.count(memory.nbytes(item.stop - start, heads, layer))
