"""PeerTransfer: the common part of transfer backends over connections: listener, rooms, notices."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

from pydantic import Field, SecretStr

from hicache_core.config.hosts import joined
from hicache_core.errors import TransferError, UseAfterClose
from hicache_core.kv_transfer.base import (
    KvTransferBackend,
    Notice,
    TransferConfig,
    TransferContext,
    UnitRows,
)
from hicache_core.kv_transfer.callers import Callers
from hicache_core.kv_transfer.carrier import Carrier
from hicache_core.kv_transfer.receiving import Receiver, ReceivingRoom, WantedRows, connection_to
from hicache_core.kv_transfer.room import PastRooms, Room
from hicache_core.kv_transfer.secret import MIN_LENGTH, SharedSecret
from hicache_core.kv_transfer.sending import Sender, SendingRoom
from hicache_core.kv_transfer.wire import (
    LEAST_NBYTES_PER_S,
    MAX_NOTE_NBYTES,
    Connection,
    Patience,
)

log = logging.getLogger(__name__)

MAX_ROOM = 2**63
# How long a receiver may wait for a request that has not reached this node's engine.
MAX_WAIT_S = 3600.0
ACCEPT_PAUSE_S = 0.1
"""Pause between two tries to accept a connection while file descriptors or threads run out."""
FAULT_S = 1.0
"""How long a failed try counts as a fault."""


class PeerConfig(TransferConfig):
    """Settings of backends that connect.

    Attributes:
        host: address to listen on; with ``0.0.0.0`` peers keep using the address under which they
            reached this node.
        port: to listen on; 0 for any free one.
        advertise: host name or address for peers, if it differs from ``host``.
        idle_timeout_s: a peer without progress for this long is lost.
        least_nbytes_per_s: slower transfers count as no progress.
        ping_s: how often a sender shows that it is alive.
        max_connections: maximum number of receivers served at once; the same number of
            connections may be in their handshake.
        secret: shared by both nodes, at least 16 characters; None for no authentication.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=65536)] = 0
    advertise: str = ""
    idle_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    least_nbytes_per_s: Annotated[int, Field(gt=0)] = LEAST_NBYTES_PER_S
    ping_s: Annotated[float, Field(gt=0)] = 0.5
    max_connections: Annotated[int, Field(gt=0)] = 256
    secret: Annotated[SecretStr, Field(min_length=MIN_LENGTH)] | None = None


class PeerTransfer(KvTransferBackend):
    """A transfer backend with one conversation for each receiver; a carrier moves the rows."""

    Config = PeerConfig
    moves_groups = True

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
        self._patience = Patience(config.idle_timeout_s, config.least_nbytes_per_s)
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._stumbled: tuple[float, str] | None = None  # when accepting failed last, and why
        self._closing = threading.Event()
        self._threads: set[threading.Thread] = set()
        self._callers = Callers(config.max_connections)
        self._lock = threading.Lock()
        self._notices: deque[Notice] = deque()
        self._offers: dict[int, SendingRoom] = {}
        self._intakes: dict[int, ReceivingRoom] = {}
        self._ended = PastRooms()
        self._closed = False
        secret = config.secret
        self._secret = SharedSecret(None if secret is None else secret.get_secret_value())
        self._sender = Sender(context.memory, carrier, self._find, config.ping_s)
        self._receiver = Receiver(context, carrier, self._connect)

    def open(self) -> None:
        # docstring inherited
        self._listener = _listener_at(self._settings.host, self._settings.port)
        try:
            self._carrier.open(self.context.memory)
            self._acceptor = self._start(self._accept, "kv-accept")
        except BaseException:
            self._listener.close()
            self._listener = None
            raise

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
        return joined(host, self._listener.getsockname()[1])

    @property
    def fault(self) -> str:
        # docstring inherited
        if self._acceptor is None or self._closed:
            return ""
        if not self._acceptor.is_alive():
            return "the listener has ended"
        if (stumbled := self._stumbled) is None or self._clock() - stumbled[0] > FAULT_S:
            return ""
        return f"no connection can be accepted: {stumbled[1]}"

    @property
    def n_connections(self) -> int:
        # docstring inherited: of receivers that are served, and to senders
        n_served = len(self._callers)
        return n_served + sum(intake.n_connections for intake in [*self._intakes.values()])

    def close(self, timeout_s: float = 5.0) -> None:
        # docstring inherited
        if self._closed:
            return
        self._closed = True
        self._closing.set()
        deadline = time.monotonic() + timeout_s
        with self._sender.arrived:
            self._sender.closing = True
            self._sender.arrived.notify_all()
        if self._listener is not None and self._acceptor is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._acceptor.join(timeout_s)  # from here on, nobody starts a thread
            self._listener.close()
        for room in self._rooms():
            room.fail(TransferError("the node is closing"))
        self._callers.shutdown()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            log.warning("KV transfers still run after %.0f s", timeout_s)
            return
        self._carrier.close()

    def offer(self, room: int, n_tokens: int, timeout_s: float) -> None:
        # docstring inherited
        self._check_new(room, self._offers)
        offer = SendingRoom(room, n_tokens, timeout_s, self._clock, self._settled(self._offers))
        with self._sender.arrived:
            self._offers[room] = offer
            deserted = self._sender.deserted.pop(room, None)
            self._sender.arrived.notify_all()
        if deserted is not None:
            offer.fail(TransferError(deserted))

    def send(
        self,
        room: int,
        pages: Sequence[int],
        layer: int,
        start: int,
        stop: int,
        group: int | None = None,
    ) -> None:
        # docstring inherited
        self._sender.n_computed += 1
        if (offer := self._offers.get(room)) is not None:
            offer.add(pages, self.context.memory.number(layer, group), start, stop)

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
        groups: Sequence[UnitRows] = (),
    ) -> None:
        # docstring inherited
        self._check_new(room, self._intakes)
        wanted = WantedRows(self.context.memory, pages, tokens, groups)
        intake = ReceivingRoom(room, wanted, timeout_s, self._clock, self._settled(self._intakes))
        self._intakes[room] = intake
        intake.enter()
        try:
            self._start(lambda: self._receiver.run(intake, addresses), f"kv-receive-{room}")
        except TransferError:
            del self._intakes[room]
            raise

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

    def _check_new(
        self, room: int, rooms: dict[int, SendingRoom] | dict[int, ReceivingRoom]
    ) -> None:
        if self._closed or self._listener is None:
            raise UseAfterClose("the transfer backend is not open")
        if not 0 <= room < MAX_ROOM:
            raise TransferError(f"room {room} is not a number from 0 to 2**63 - 1")
        if room in rooms:
            raise TransferError(f"room {room} is taken by another request")

    def _settled(
        self, rooms: dict[int, SendingRoom] | dict[int, ReceivingRoom]
    ) -> Callable[[Notice], None]:
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

    def _find(self, room: int) -> SendingRoom | None:
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
        peer = connection_to(address, deadline, self._patience, self._clock)
        try:
            self._secret.prove_to(peer)
        except BaseException:
            peer.close()
            raise
        return peer

    def _accept(self) -> None:
        """Lets receivers in until the backend closes, whatever goes wrong meanwhile."""
        assert self._listener is not None
        while not self._closing.is_set():
            try:
                sock, peer = self._listener.accept()
            except OSError as error:
                self._stumble(error)
                continue
            name = f"decode node {joined(*peer[:2])}"
            shake_by = self._clock() + self._settings.idle_timeout_s
            caller = Connection(sock, name, self._patience, shake_by, self._clock)
            self._callers.enter(caller)
            try:
                self._start(partial(self._serve, caller), f"kv-send-{peer[1]}")
            except TransferError as error:
                self._leave(caller)
                self._stumble(error)

    def _stumble(self, error: Exception) -> None:
        """A connection could not be accepted: the next one may, after a pause."""
        if self._closed or getattr(error, "errno", None) == errno.ECONNABORTED:
            return
        if not self.fault:
            log.error("no connection for KV can be accepted, trying on: %s", error)
        self._stumbled = (self._clock(), str(error))
        self._closing.wait(ACCEPT_PAUSE_S)

    def _serve(self, caller: Connection) -> None:
        def admit() -> None:
            self._callers.admit(caller)
            caller.deadline = self._clock() + MAX_WAIT_S

        try:
            if not self._closed and self._secret.admit(caller):
                self._sender.serve(caller, admit)
        finally:
            self._leave(caller)

    def _leave(self, caller: Connection) -> None:
        self._callers.leave(caller)
        caller.shutdown()
        caller.close()

    def _start(self, work: Callable[[], None], name: str) -> threading.Thread:
        """Runs ``work`` on a thread of its own.

        Raises:
            TransferError: no thread can be started.
        """

        def run() -> None:
            try:
                work()
            except Exception:  # nobody waits for this thread: it is told here or nowhere
                log.exception("%s broke", name)
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name)
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            with self._lock:
                self._threads.discard(thread)
            raise TransferError(f"no thread can be started for KV transfers: {error}") from error
        return thread


def _listener_at(host: str, port: int) -> socket.socket:
    """Listens there.

    Raises:
        TransferError: no such host, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=128)
    except (OSError, ValueError) as error:
        raise TransferError(
            f"cannot listen on {joined(host, port)} for KV transfers: {error}"
        ) from error
