"""Mooncake's TransferEngine as a transfer backend: the decode node reads the prefill's pages."""

from __future__ import annotations

import importlib
import math
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import field_validator

from hicache_core.errors import BrokenBackend, TransferError
from hicache_core.plugin import hookimpl
from hicache_core.plugin.transfers import (
    WILDCARDS,
    Carrier,
    Connection,
    Frame,
    KvTransferBackend,
    PageMemory,
    PeerConfig,
    PeerTransfer,
    TransferContext,
    is_loopback,
    joined,
)
from hicache_mooncake.client import INSTALL
from hicache_mooncake.environment import variables
from hicache_mooncake.memory import address_of

MAX_SLICES = 1 << 16
BATCH_SLICES = 256
P2P = "P2PHANDSHAKE"
READ_LIMIT_S = 86_400
"""Limit of a whole read. What comes later would still be written, into pages that may have another
owner by then; so it is out of reach, and silence is what ends a read."""

_SLICE = struct.Struct("<QQ")


class MooncakeTransferConfig(PeerConfig):
    """Settings of transfers over Mooncake, in addition to those of ``PeerConfig``.

    Attributes:
        protocol: ``tcp``, or ``rdma`` if there is a device.
        device_name: RDMA devices, separated by commas (``--disaggregation-ib-device``); empty lets
            Mooncake choose.
        metadata_server: ``P2PHANDSHAKE``: nodes send each other the addresses of their engines.
    """

    protocol: str = "tcp"
    device_name: str = ""
    metadata_server: str = P2P

    @field_validator("metadata_server")
    @classmethod
    def _check_metadata_server(cls, value: str) -> str:
        if value != P2P:
            raise ValueError(
                f"{value!r} is not used for transfers: nodes send each other the addresses of "
                f"their engines; do not set it, or set it to {P2P}"
            )
        return value


class EngineCarrier(Carrier):
    """Sends where rows lie; the receiver's engine reads them from there.

    Reading, not writing: only the owner of the receiving pages moves bytes into them, so a sender
    that hangs and wakes up later cannot spoil pages that have another owner by then.
    """

    def __init__(self, config: MooncakeTransferConfig) -> None:
        """Loads nothing yet."""
        self._config = config
        self._engine: Any = None
        self._engines: dict[str, Any] = {}  # by the host that each one calls itself
        self._starting = threading.Lock()
        self._ranges: list[tuple[int, int]] = []
        self._scratch = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._reached: set[str] = set()

    def open(self, memory: PageMemory) -> None:
        """Starts the engine and registers the pages.

        Raises:
            BrokenBackend: Mooncake is not installed.
            TransferError: no engine with this protocol and device, or memory it does not take.
        """
        _set_limits(self._config.idle_timeout_s)
        regions = [*memory.every_region(), self._scratch]
        self._ranges = sorted((address_of(r), r.nbytes) for r in regions)
        self._engine = self._engine_at(_own_host(self._config))

    def _engine_at(self, host: str) -> Any:
        """The engine that calls itself ``host``, started if there was none.

        An engine tells its peers itself where it is, so they must be able to use the name.
        """
        with self._starting:
            if host not in self._engines:
                self._engines[host] = _started(self._config, host, self._ranges)
            return self._engines[host]

    def close(self) -> None:
        # docstring inherited; an engine has no other end than that of its last reference
        for engine in self._engines.values():
            _forget(engine, self._ranges)
        self._engines.clear()
        self._reached.clear()
        self._engine = None

    def greeting(self, reached_at: str) -> dict[str, Any]:
        """Where the engine is; one that listens everywhere is named as the receiver found it."""
        host = _own_host(self._config)
        if _listens_everywhere(self._config) and reached_at and not is_loopback(reached_at):
            host = reached_at
        port = self._engine_at(host).get_rpc_port()
        return {"session": joined(host, port), "scratch": address_of(self._scratch)}

    def send_rows(self, peer: Connection, frame: Frame, segments: Sequence[memoryview]) -> None:
        # docstring inherited
        places = b"".join(_SLICE.pack(address_of(s), s.nbytes) for s in segments)
        peer.send(replace(frame, nbytes=len(places)), [places])

    def receive_rows(
        self,
        peer: Connection,
        frame: Frame,
        segments: Sequence[memoryview],
        greeting: dict[str, Any],
    ) -> None:
        # docstring inherited
        if frame.nbytes > MAX_SLICES * _SLICE.size or frame.nbytes % _SLICE.size:
            raise TransferError(f"{peer.peer} sent {frame.nbytes} bytes of addresses")
        raw = bytearray(frame.nbytes)
        peer.receive_into([memoryview(raw)])
        theirs = list(_SLICE.iter_unpack(raw))
        mine = [(address_of(segment), segment.nbytes) for segment in segments]
        if sum(n for _, n in theirs) != sum(n for _, n in mine):
            raise TransferError(f"{peer.peer} has rows of another size")
        copies = align(theirs, mine)
        session = self._reach(peer, greeting)
        for at in range(0, len(copies), BATCH_SLICES):
            batch = copies[at : at + BATCH_SLICES]
            code = self._engine.batch_transfer_sync_read(
                session,
                [target for _, target, _ in batch],
                [source for source, _, _ in batch],
                [nbytes for _, _, nbytes in batch],
            )
            if code != 0:
                raise TransferError(f"Mooncake could not read from {peer.peer} (code {code})")

    def _reach(self, peer: Connection, greeting: dict[str, Any]) -> str:
        """The peer's session, once its engine has answered.

        Mooncake waits a minute for a silent peer at first contact, whatever it is told, and would
        write what it reads afterwards. So the first read goes to nobody's page, on a thread that
        may be left behind.
        """
        session, theirs = _engine_of(peer, greeting)
        if session in self._reached:
            return session
        codes: list[int] = []
        engine, mine = self._engine, address_of(self._scratch)

        def touch() -> None:
            codes.append(engine.batch_transfer_sync_read(session, [mine], [theirs], [_SLICE.size]))

        contact = threading.Thread(target=touch, name=f"mooncake-contact-{session}", daemon=True)
        try:
            contact.start()
        except RuntimeError as error:
            raise TransferError(f"no thread can be started: {error}") from error
        contact.join(self._config.idle_timeout_s)
        if codes != [0]:
            what = f"code {codes[0]}" if codes else f"silent for {self._config.idle_timeout_s:g} s"
            raise TransferError(f"the engine of {peer.peer} cannot be reached ({what})")
        self._reached.add(session)
        return session


def _listens_everywhere(config: MooncakeTransferConfig) -> bool:
    return not config.advertise and config.host in WILDCARDS


def _own_host(config: MooncakeTransferConfig) -> str:
    """What this node's engine calls itself: as it was told, or the address that faces others."""
    if not _listens_everywhere(config):
        return config.advertise or config.host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outwards:
        try:
            outwards.connect(("192.0.2.1", 9))  # an address for examples: nothing is sent there
            return str(outwards.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _started(config: MooncakeTransferConfig, host: str, ranges: Sequence[tuple[int, int]]) -> Any:
    """An engine that knows the ranges (address, nbytes).

    Raises:
        BrokenBackend: Mooncake is not installed.
        TransferError: it does not start, or does not take the memory.
    """
    try:
        library = importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise BrokenBackend(f"mooncake.engine does not load ({error}); {INSTALL}") from error
    with variables(MC_TRANSFER_TIMEOUT=READ_LIMIT_S):
        engine = library.TransferEngine()
        code = engine.initialize(host, P2P, config.protocol, config.device_name)
    if code != 0:
        raise TransferError(
            f"Mooncake's TransferEngine does not start on {host} with protocol "
            f"{config.protocol!r} and device {config.device_name!r} (code {code})"
        )
    for n, (address, nbytes) in enumerate(ranges):
        if (code := engine.register_memory(address, nbytes)) != 0:
            _forget(engine, ranges[:n])
            raise TransferError(f"Mooncake does not register {nbytes} bytes (code {code})")
    return engine


def _forget(engine: Any, ranges: Sequence[tuple[int, int]]) -> None:
    for address, _ in ranges:
        engine.unregister_memory(address)


def _engine_of(peer: Connection, greeting: dict[str, Any]) -> tuple[str, int]:
    """The session of the peer's engine, and the address of a page of its that may be read.

    Raises:
        TransferError: the greeting does not say so.
    """
    session, page = greeting.get("session"), greeting.get("scratch")
    if isinstance(session, str) and isinstance(page, int) and 0 < page < 1 << 64:
        return session, page
    raise TransferError(f"{peer.peer} names no engine in its greeting")


def _set_limits(idle_timeout_s: float) -> None:
    """When the tcp transport gives up on a peer that is silent, unless the operator has said so.

    It reads them late, once in a process, so they stay. It then closes its connection, so that
    nothing is written afterwards.
    """
    for name in ("MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_TCP_STATUS_TIMEOUT_SEC"):
        os.environ.setdefault(name, str(max(1, math.ceil(idle_timeout_s))))


class MooncakeTransfer(PeerTransfer):
    """KV by Mooncake's TransferEngine; tcp, or RDMA where there is a device."""

    name = "mooncake"
    Config = MooncakeTransferConfig

    def __init__(
        self,
        config: MooncakeTransferConfig,
        context: TransferContext,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # docstring inherited
        super().__init__(config, context, EngineCarrier(config), clock)


def align(
    sources: Sequence[tuple[int, int]], targets: Sequence[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """(source, target, nbytes) of copies between two lists of (address, nbytes) of equal sum.

    ::

        sources   |------- a -------|--- b ---|
        targets   |--- x ---|------- y -------|
        copies    |---------|-------|---------|
    """
    copies: list[tuple[int, int, int]] = []
    rest = list(reversed(targets))
    for address, nbytes in sources:
        done = 0
        while done < nbytes:
            target, room = rest.pop()
            n = min(nbytes - done, room)
            copies.append((address + done, target, n))
            if room > n:
                rest.append((target + n, room - n))
            done += n
    return copies


@hookimpl
def hicache_transfer_backends() -> list[type[KvTransferBackend]]:
    """The transfer backend of this distribution."""
    return [MooncakeTransfer]
