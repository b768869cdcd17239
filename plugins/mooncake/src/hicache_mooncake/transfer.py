"""Mooncake's TransferEngine as a transfer backend: the decode node reads the prefill's pages."""

from __future__ import annotations

import importlib
import struct
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
from hicache_mooncake.memory import address_of

MAX_SLICES = 1 << 16
BATCH_SLICES = 256
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
        ranges = [(address_of(r), r.nbytes) for layers in memory.regions for r in layers]
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
        self._engine = None

    def greeting(self) -> dict[str, Any]:
        # docstring inherited
        host = self._config.advertise or self._config.host
        return {"session": f"{host}:{self._engine.get_rpc_port()}"}

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
        for at in range(0, len(copies), BATCH_SLICES):
            batch = copies[at : at + BATCH_SLICES]
            code = self._engine.batch_transfer_sync_read(
                str(greeting.get("session", "")),
                [target for _, target, _ in batch],
                [source for source, _, _ in batch],
                [nbytes for _, _, nbytes in batch],
            )
            if code != 0:
                raise TransferError(f"Mooncake could not read from {peer.peer} (code {code})")


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
