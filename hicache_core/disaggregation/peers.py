"""PeerTransfer: what every transfer backend over connections shares: listener, rooms, notices."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

from pydantic import Field, SecretStr

from hicache_core.disaggregation.carrier import Carrier
from hicache_core.disaggregation.receiving import Intake, Receiver, connection_to
from hicache_core.disaggregation.room import PastRooms, Room
from hicache_core.disaggregation.secret import MIN_LENGTH, SharedSecret
from hicache_core.disaggregation.sending import Offer, Sender
from hicache_core.disaggregation.transfer import (
    KvTransferBackend,
    Notice,
    TransferConfig,
    TransferContext,
)
from hicache_core.disaggregation.wire import MAX_NOTE_NBYTES, Connection
from hicache_core.errors import TransferError, UseAfterClose

log = logging.getLogger(__name__)

MAX_ROOM = 2**63
# How long a receiver may wait for a request that has not reached this node's engine.
MAX_WAIT_S = 3600.0


class PeerConfig(TransferConfig):
    """Settings of backends that connect.

    Attributes:
        host: where to listen; receivers must reach it under this name unless ``advertise`` is set.
        port: 0 for any free one.
        advertise: the host that peers are told, where it is not ``host``.
        idle_timeout_s: a peer that says nothing for so long is lost.
        ping_s: how often a sender says that it is there.
        max_connections: receivers served at once; more are turned away.
        secret: what both nodes must know, at least 16 characters; None where nothing is asked.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=65536)] = 0
    advertise: str = ""
    idle_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    ping_s: Annotated[float, Field(gt=0)] = 0.5
    max_connections: Annotated[int, Field(gt=0)] = 256
    secret: Annotated[SecretStr, Field(min_length=MIN_LENGTH)] | None = None


class PeerTransfer(KvTransferBackend):
    """A transfer backend whose rooms are conversations; the carrier moves the rows."""

    Config = PeerConfig

    def __init__(
        self,
        config: PeerConfig,
        context: TransferContext,
        carrier: Carrier,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # docstring inherited
        super().__init__(config, context)
        self._settings = config
        self._clock = clock
        self._carrier = carrier
        self._listener: socket.socket | None = None
        self._threads: set[threading.Thread] = set()
        self._callers: set[Connection] = set()
        self._lock = threading.Lock()
        self._notices: deque[Notice] = deque()
        self._offers: dict[int, Offer] = {}
        self._intakes: dict[int, Intake] = {}
        self._ended = PastRooms()
        self._closed = False
        secret = config.secret
        self._secret = SharedSecret(None if secret is None else secret.get_secret_value())
        self._sender = Sender(context.memory, carrier, self._find, config.ping_s)
        self._receiver = Receiver(context, carrier, self._connect)

    def open(self) -> None:
        # docstring inherited
        settings = self._settings
        self._carrier.open(self.context.memory)
        try:
            self._listener = socket.create_server((settings.host, settings.port), backlog=128)
        except OSError as error:
            self._carrier.close()
            raise TransferError(
                f"cannot listen on {settings.host}:{settings.port} for KV transfers: {error}"
            ) from error
        self._start(self._accept, "kv-accept")

    def introduce(self, addresses: Sequence[str]) -> None:
        # docstring inherited
        own = self.context.rank
        self._sender.others = [address for rank, address in enumerate(addresses) if rank != own]

    @property
    def address(self) -> str:
        # docstring inherited
        if self._listener is None:
            raise UseAfterClose("the transfer backend is not open")
        host = self._settings.advertise or self._settings.host
        return f"{host}:{self._listener.getsockname()[1]}"

    @property
    def n_connections(self) -> int:
        # docstring inherited: of receivers that are served, and to senders
        with self._lock:
            n_served = len(self._callers)
        return n_served + sum(intake.n_connections for intake in [*self._intakes.values()])

    def close(self, timeout_s: float = 5.0) -> None:
        # docstring inherited
        if self._closed:
            return
        self._closed = True
        with self._sender.arrived:
            self._sender.closing = True
            self._sender.arrived.notify_all()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for room in self._rooms():
            room.fail(TransferError("the node is closing"))
        with self._lock:
            callers, threads = list(self._callers), list(self._threads)
        for caller in callers:
            caller.shutdown()
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            log.warning("KV transfers still run after %.0f s", timeout_s)
            return
        self._carrier.close()

    def offer(self, room: int, n_tokens: int, timeout_s: float) -> None:
        # docstring inherited
        self._check_new(room, self._offers)
        offer = Offer(room, n_tokens, timeout_s, self._clock, self._settled(self._offers))
        with self._sender.arrived:
            self._offers[room] = offer
            deserted = self._sender.deserted.pop(room, None)
            self._sender.arrived.notify_all()
        if deserted is not None:
            offer.fail(TransferError(deserted))

    def send(self, room: int, pages: Sequence[int], layer: int, start: int, stop: int) -> None:
        # docstring inherited
        if (offer := self._offers.get(room)) is not None:
            offer.add(pages, layer, start, stop)

    def finish(self, room: int, note: bytes) -> None:
        # docstring inherited
        if len(note) > MAX_NOTE_NBYTES:
            raise TransferError(f"a note of {len(note)} bytes; {MAX_NOTE_NBYTES} are allowed")
        if (offer := self._offers.get(room)) is not None:
            offer.finish(note)

    def receive(
        self,
        room: int,
        addresses: Sequence[str],
        pages: Sequence[int],
        tokens: tuple[int, int],
        timeout_s: float,
    ) -> None:
        # docstring inherited
        self._check_new(room, self._intakes)
        intake = Intake(room, pages, tokens, timeout_s, self._clock, self._settled(self._intakes))
        self._intakes[room] = intake
        intake.enter()
        self._start(lambda: self._receiver.run(intake, addresses), f"kv-receive-{room}")

    def cancel(self, room: int, reason: str) -> None:
        # docstring inherited
        for rooms in (self._offers, self._intakes):
            if (found := rooms.get(room)) is not None:
                found.fail(TransferError(reason))

    def poll(self) -> list[Notice]:
        # docstring inherited
        now = self._clock()
        for room in self._rooms():
            if now >= room.deadline:
                room.fail(TransferError("no peer took part in the transfer in time"))
        notices = []
        while self._notices:
            notices.append(self._notices.popleft())
        return notices

    def _rooms(self) -> list[Room]:
        return [*self._offers.values(), *self._intakes.values()]

    def _check_new(self, room: int, rooms: dict[int, Offer] | dict[int, Intake]) -> None:
        if self._closed or self._listener is None:
            raise UseAfterClose("the transfer backend is not open")
        if not 0 <= room < MAX_ROOM:
            raise TransferError(f"room {room} is not a number from 0 to 2**63 - 1")
        if room in rooms:
            raise TransferError(f"room {room} is taken by another request")

    def _settled(self, rooms: dict[int, Offer] | dict[int, Intake]) -> Callable[[Notice], None]:
        def settled(notice: Notice) -> None:
            if rooms is self._offers:
                self._remember(notice)
            rooms.pop(notice.room, None)
            self._notices.append(notice)
            self.context.on_notice()

        return settled

    def _remember(self, notice: Notice) -> None:
        """Receivers that come late for a room are told at once that it has ended."""
        with self._sender.arrived:
            self._ended.remember(notice.room, notice.error or "it was handed over already")
            self._sender.arrived.notify_all()

    def _find(self, room: int) -> Offer | None:
        """The offer of a room; None if there was none yet. Called under ``arrived``.

        Raises:
            TransferError: it has ended.
        """
        if (offer := self._offers.get(room)) is not None:
            return offer
        if room in self._ended:
            raise TransferError(f"room {room} has ended: {self._ended[room]}")
        return None

    def _connect(self, address: str, deadline: float) -> Connection:
        peer = connection_to(address, deadline, self._settings.idle_timeout_s, self._clock)
        try:
            self._secret.prove_to(peer)
        except BaseException:
            peer.close()
            raise
        return peer

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError:  # closed
                return
            with self._lock:
                full = len(self._callers) >= self._settings.max_connections
            if full or self._closed:
                log.warning("turned %s away: %d receivers are served", peer, len(self._callers))
                sock.close()
                continue
            connection = Connection(
                sock,
                f"decode node {peer[0]}:{peer[1]}",
                self._settings.idle_timeout_s,
                self._clock() + MAX_WAIT_S,
                self._clock,
            )
            self._start(partial(self._serve, connection), f"kv-send-{peer[1]}")

    def _serve(self, caller: Connection) -> None:
        with self._lock:
            self._callers.add(caller)
        try:
            if not self._closed and self._secret.admit(caller):
                self._sender.serve(caller)
        finally:
            with self._lock:
                self._callers.discard(caller)
            caller.shutdown()
            caller.close()

    def _start(self, work: Callable[[], None], name: str) -> None:
        def run() -> None:
            try:
                work()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name)
        with self._lock:
            self._threads.add(thread)
        thread.start()
