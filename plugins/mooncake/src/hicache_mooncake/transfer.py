"""Mooncake's TransferEngine as a transfer backend: the decode node reads the prefill's pages."""

from __future__ import annotations

import importlib
import math
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hicache_core.disaggregation.carrier import Carrier
from hicache_core.disaggregation.page_memory import PageMemory
from hicache_core.disaggregation.peers import PeerConfig, PeerTransfer
from hicache_core.disaggregation.transfer import KvTransferBackend, TransferContext
from hicache_core.disaggregation.wire import Connection, Frame
from hicache_core.errors import BrokenBackend, TransferError
from hicache_core.hookspecs import hookimpl
from hicache_mooncake.client import INSTALL
from hicache_mooncake.environment import variables
from hicache_mooncake.memory import address_of

MAX_SLICES = 1 << 16
BATCH_SLICES = 256
READ_LIMIT_S = 86_400
"""Limit of a whole read. What comes later would still be written, into pages that may have another
owner by then; so it is out of reach, and silence is what ends a read."""

_SLICE = struct.Struct("<QQ")


class MooncakeTransferConfig(PeerConfig):
    """Settings beside those of every connecting backend.

    Attributes:
        protocol: ``tcp``, or ``rdma`` where there is a device.
        device_name: RDMA devices, by comma (``--disaggregation-ib-device``); empty lets Mooncake
            choose.
        metadata_server: where engines find each other; by default they ask each other.
    """

    protocol: str = "tcp"
    device_name: str = ""
    metadata_server: str = "P2PHANDSHAKE"


class EngineCarrier(Carrier):
    """Sends where rows lie; the receiver's engine reads them from there.

    Reading, not writing: only the owner of the receiving pages moves bytes into them, so a sender
    that hangs and wakes up later cannot spoil pages that have another owner by then.
    """

    def __init__(self, config: MooncakeTransferConfig) -> None:
        """Loads nothing yet."""
        self._config = config
        self._engine: Any = None
        self._registered: list[int] = []
        self._scratch = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._reached: set[str] = set()

    def open(self, memory: PageMemory) -> None:
        """Starts the engine and registers the pages.

        Raises:
            BrokenBackend: Mooncake is not installed.
            TransferError: no engine with this protocol and device, or memory it does not take.
        """
        try:
            library = importlib.import_module("mooncake.engine")
        except ImportError as error:
            raise BrokenBackend(f"mooncake.engine does not load ({error}); {INSTALL}") from error
        config = self._config
        _set_limits(config.idle_timeout_s)
        with variables(MC_TRANSFER_TIMEOUT=READ_LIMIT_S):
            engine = library.TransferEngine()
            code = engine.initialize(
                config.advertise or config.host,
                config.metadata_server,
                config.protocol,
                config.device_name,
            )
        if code != 0:
            raise TransferError(
                f"Mooncake's TransferEngine does not start on {config.host} with protocol "
                f"{config.protocol!r} and device {config.device_name!r} (code {code})"
            )
        self._engine = engine
        regions = [region for layers in memory.regions for region in layers]
        ranges = [(address_of(r), r.nbytes) for r in [*regions, self._scratch]]
        for address, nbytes in sorted(ranges):
            if (code := engine.register_memory(address, nbytes)) != 0:
                self.close()
                raise TransferError(f"Mooncake does not register {nbytes} bytes (code {code})")
            self._registered.append(address)

    def close(self) -> None:
        # docstring inherited; the engine has no other end than that of its last reference
        for address in self._registered:
            self._engine.unregister_memory(address)
        self._registered.clear()
        self._reached.clear()
        self._engine = None

    def greeting(self) -> dict[str, Any]:
        # docstring inherited
        host = self._config.advertise or self._config.host
        return {
            "session": f"{host}:{self._engine.get_rpc_port()}",
            "scratch": address_of(self._scratch),
        }

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
        try:
            session, theirs = str(greeting["session"]), int(greeting["scratch"])
        except (KeyError, TypeError, ValueError) as error:
            raise TransferError(f"{peer.peer} names no engine in its greeting") from error
        if session in self._reached:
            return session
        codes: list[int] = []
        engine, mine = self._engine, address_of(self._scratch)

        def touch() -> None:
            codes.append(engine.batch_transfer_sync_read(session, [mine], [theirs], [_SLICE.size]))

        contact = threading.Thread(target=touch, name=f"mooncake-contact-{session}", daemon=True)
        contact.start()
        contact.join(self._config.idle_timeout_s)
        if codes != [0]:
            what = f"code {codes[0]}" if codes else f"silent for {self._config.idle_timeout_s:g} s"
            raise TransferError(f"the engine of {peer.peer} cannot be reached ({what})")
        self._reached.add(session)
        return session


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
