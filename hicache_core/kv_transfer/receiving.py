"""Receiving: the decode side, one thread for each sender of a room."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hicache_core.errors import HiCacheError, TransferError
from hicache_core.kv_transfer.base import Notice, TransferContext, TransferState, UnitRows
from hicache_core.kv_transfer.carrier import Carrier
from hicache_core.kv_transfer.handshake import divide, hello_of, want_of, welcomed_of
from hicache_core.kv_transfer.page_memory import Heads, PageMemory
from hicache_core.kv_transfer.room import Room
from hicache_core.kv_transfer.wire import Connection, Frame, Kind, Patience, checksum_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Part:
    """One sender's share of a room; no heads: it has nothing that is wanted."""

    peer: Connection
    heads: Heads | None
    greeting: dict[str, Any]


class WantedRows:
    """Which rows a room is to have, and where they go: by number of the layer."""

    def __init__(
        self,
        memory: PageMemory,
        pages: Sequence[int],
        tokens: tuple[int, int],
        groups: Sequence[UnitRows] = (),
    ) -> None:
        """Checks that every group is there.

        Args:
            memory: of the receiver.
            pages: ids of the full pages of tokens 0 to stop.
            tokens: (start, stop) of the rows of full pages.
            groups: the rows of each group.

        Raises:
            TransferError: they are not those of the memory's groups.
        """
        if len(groups) != len(memory.groups):
            names = [group.name for group in memory.spec.groups]
            raise TransferError(
                f"rows of groups {names} are needed; {len(groups)} groups are given"
            )
        self.tokens = tokens
        self._layers: dict[int, UnitRows] = {}
        for group, rows in ((None, UnitRows(tuple(pages), tokens)), *enumerate(groups)):
            spec = memory.spec if group is None else memory.groups[group].spec
            for layer in range(spec.num_layers):
                if group is None or spec.components_in(layer):
                    self._layers[memory.number(layer, group)] = rows

    def starts(self) -> dict[int, int]:
        """The first wanted token of each layer."""
        return {number: rows.tokens[0] for number, rows in self._layers.items()}

    def of(self, number: int) -> UnitRows:
        """What a layer is to have."""
        return self._layers[number]

    def are_complete(self, reached: Mapping[int, int]) -> bool:
        """Whether rows up to ``reached``, by layer, are all."""
        return all(reached[number] >= rows.tokens[1] for number, rows in self._layers.items())


class ReceivingRoom(Room):
    """A room on the decode side: says where the rows go."""

    def __init__(
        self,
        number: int,
        wanted: WantedRows,
        timeout_s: float,
        clock: Callable[[], float],
        settled: Callable[[Notice], None],
    ) -> None:
        """Nothing has arrived yet.

        Args:
            number: of the room.
            wanted: the rows to fetch.
            timeout_s: the room fails when this time is over.
            clock: seconds, monotonic.
            settled: called once, with the notice.
        """
        super().__init__(number, timeout_s, clock, settled)
        self.wanted = wanted


class Receiver:
    """Fetches rooms from the ranks of a prefill node."""

    def __init__(
        self,
        context: TransferContext,
        carrier: Carrier,
        connect: Callable[[str, float], Connection],
    ) -> None:
        """Connects to nothing yet.

        Args:
            context: the process that receives.
            carrier: moves the rows.
            connect: ``connect(address, deadline)`` opens a connection or raises TransferError.
        """
        self._context = context
        self._memory = context.memory
        self._carrier = carrier
        self._connect = connect

    def run(self, intake: ReceivingRoom, addresses: Sequence[str]) -> None:
        """Fetches all rows; returns when no thread works for the room any more."""
        parts: list[_Part] = []
        try:
            with contextlib.suppress(HiCacheError), intake.failing():
                self._greet_all(intake, addresses, parts)
                note = self._fetch_all(intake, parts)
                for part in parts:
                    with contextlib.suppress(TransferError):  # it keeps its pages a bit longer
                        part.peer.send(Frame(Kind.ACK, intake.number))
                intake.succeed(TransferState.ARRIVED, note)
        finally:
            for part in parts:
                intake.unwatch(part.peer)
                part.peer.shutdown()
                part.peer.close()
            intake.leave()

    def _greet_all(
        self, intake: ReceivingRoom, addresses: Sequence[str], parts: list[_Part]
    ) -> None:
        missing: list[Heads] = [self._memory.heads]
        known = list(addresses)
        while len(parts) < len(known):
            address = known[len(parts)]
            peer = self._connect(address, intake.deadline)
            part = _Part(peer, None, {})
            parts.append(part)  # from now on it is closed with the others
            hello = hello_of(self._memory, self._context.rank, self._context.world_size)
            peer.send_json(Kind.HELLO, intake.number, hello)
            intake.watch(peer)  # not before: a sender that was greeted notices that this one left
            welcome = welcomed_of(peer.receive_json(Kind.WELCOME)[1], address)
            heads, missing = divide(missing, welcome.heads)
            peer.send_json(Kind.WANT, intake.number, want_of(heads, intake.wanted.tokens))
            parts[-1] = _Part(peer, heads, welcome.carrier)
            if len(known) == 1:
                known += welcome.others
        if missing:
            raise TransferError(f"heads {missing} are on none of {', '.join(known)}")

    def _fetch_all(self, intake: ReceivingRoom, parts: Sequence[_Part]) -> bytes:
        """The note; parts but the first run on threads of their own. One that fails ends all."""

        def fetch(part: _Part) -> None:
            with contextlib.suppress(HiCacheError), intake.failing():
                self._fetch(intake, part)

        threads: list[threading.Thread] = []
        try:
            with intake.failing():
                for n, part in enumerate(parts[1:], start=1):
                    name = f"kv-receive-{intake.number}-{n}"
                    thread = threading.Thread(target=fetch, args=(part,), name=name)
                    thread.start()
                    threads.append(thread)
                note = self._fetch(intake, parts[0])
        finally:
            for thread in threads:
                thread.join()
        if intake.decided:
            raise TransferError("a part of the transfer failed")
        return note

    def _fetch(self, intake: ReceivingRoom, part: _Part) -> bytes:
        reached = intake.wanted.starts()
        n_computed: object = None
        part.peer.renew()  # others were greeted meanwhile
        while True:
            frame = part.peer.receive()
            if frame.room != intake.number:
                raise TransferError(f"{part.peer.peer} sent room {frame.room}")
            if frame.kind is Kind.PING:
                before, n_computed = n_computed, part.peer.json_of(frame).get("computed")
                if before not in (None, n_computed):
                    part.peer.renew()  # others come first, but that node gets on
                continue
            if frame.kind is Kind.END:
                note = part.peer.text_of(frame)
                if part.heads is not None and not intake.wanted.are_complete(reached):
                    raise TransferError(f"{part.peer.peer} ended before all rows were sent")
                return note
            if frame.kind is not Kind.LAYER or part.heads is None:
                raise TransferError(f"{part.peer.peer} sent an unexpected {frame.kind.name}")
            self._fetch_layer(intake, part, frame, reached)

    def _fetch_layer(
        self, intake: ReceivingRoom, part: _Part, frame: Frame, reached: dict[int, int]
    ) -> None:
        fits = frame.start == reached.get(frame.layer)
        rows = intake.wanted.of(frame.layer) if fits else None
        if part.heads is None or rows is None or not frame.start < frame.stop <= rows.tokens[1]:
            raise TransferError(
                f"{part.peer.peer} sent tokens {frame.start} to {frame.stop} of layer "
                f"{frame.layer} out of turn"
            )
        memory, layer = self._memory.part(frame.layer)
        heads = self._memory.heads_in(memory, part.heads)
        segments = memory.segments(layer, rows.pages, frame.start, frame.stop, heads)
        self._carrier.receive_rows(part.peer, frame, segments, part.greeting)
        if checksum_of(segments) != frame.checksum:
            raise TransferError(
                f"the checksum of layer {frame.layer}, tokens {frame.start} to {frame.stop} from "
                f"{part.peer.peer} is wrong"
            )
        part.peer.renew()
        reached[frame.layer] = frame.stop
        intake.count(memory.nbytes(frame.stop - frame.start, heads, layer))


def connection_to(
    address: str, deadline: float, patience: Patience, clock: Callable[[], float]
) -> Connection:
    """Opens a connection to a prefill node.

    Args:
        address: ``host:port``.
        deadline: when the transfer must have ended, by ``clock``.
        patience: how long the peer may be without progress.
        clock: seconds, increasing.

    Raises:
        TransferError: no node answers there.
    """
    host, _, port = address.rpartition(":")
    left_s = min(patience.idle_timeout_s, deadline - clock())
    try:
        if left_s <= 0:
            raise TimeoutError("the time of the transfer is over")
        sock = socket.create_connection((host.strip("[]"), int(port)), timeout=left_s)
    except (OSError, ValueError, OverflowError) as error:
        raise TransferError(f"no prefill node answers at {address}: {error}") from error
    return Connection(sock, f"prefill node {address}", patience, deadline, clock)
