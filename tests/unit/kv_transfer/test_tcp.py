"""The backend ``tcp``: the kit's rules, and what only sockets can do wrong."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

import pytest

from hicache_core.kv_transfer.base import KvTransferBackend, TransferContext, TransferState
from hicache_core.kv_transfer.handshake import hello_of, want_of
from hicache_core.kv_transfer.peers import PeerConfig
from hicache_core.kv_transfer.tcp import TcpTransfer
from hicache_core.kv_transfer.wire import Connection, Kind, Patience
from hicache_core.testing.transfer_kit import ROOM, WAIT_S, TransferKit


class TestTcp(TransferKit):
    def make(self, context: TransferContext) -> KvTransferBackend:
        return TcpTransfer(PeerConfig(ping_s=0.05, idle_timeout_s=1.0), context)

    @pytest.mark.parametrize("at", [150, 700, 1100])
    def test_a_flipped_bit_fails_the_room(self, at: int) -> None:
        prefill, decode = self.pair()
        prefill.backend.offer(ROOM, 8, WAIT_S)
        prefill.send_all([0, 1], 8)
        with Meddler(prefill.backend.address, flip_at=at) as meddler:
            decode.backend.receive(ROOM, [meddler.address], [0, 1], (0, 8), WAIT_S)
            failed = decode.notice()
        assert failed.state is TransferState.FAILED
        assert prefill.notice().state is TransferState.FAILED

    def test_a_peer_that_falls_silent_fails_the_room(self) -> None:
        prefill, decode = self.pair()
        prefill.backend.offer(ROOM, 8, WAIT_S)
        prefill.send_all([0, 1], 8)
        with Meddler(prefill.backend.address, stop_at=900) as meddler:
            decode.backend.receive(ROOM, [meddler.address], [0, 1], (0, 8), WAIT_S)
            failed = decode.notice()
        assert failed.state is TransferState.FAILED
        # The sender, which waits for an answer as long, may have noticed first.
        assert "made no progress for 1 s" in failed.error or "closed the connection" in failed.error

    def test_a_stranger_is_ignored(self) -> None:
        prefill, decode = self.pair()
        host, port = prefill.backend.address.split(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + b"x" * 100)
            stranger.settimeout(WAIT_S)
            assert stranger.recv(1) == b""
        prefill.backend.offer(ROOM, 4, WAIT_S)
        prefill.send_all([0], 4)
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        assert decode.notice().state is TransferState.ARRIVED

    @pytest.mark.parametrize("after", [Kind.HELLO, Kind.WANT])
    def test_nobody_waits_for_a_receiver_that_left_before_the_offer(self, after: Kind) -> None:
        prefill, decode = self.pair()
        host, port = prefill.backend.address.split(":")
        peer = Connection(
            socket.create_connection((host, int(port))),
            "prefill",
            Patience(WAIT_S),
            WAIT_S,
            lambda: 0.0,
        )
        peer.send_json(Kind.HELLO, ROOM, hello_of(decode.memory, 0, 1))
        if after is Kind.WANT:
            peer.receive_json(Kind.WELCOME)
            peer.send_json(Kind.WANT, ROOM, want_of((0, 8), (0, 4)))
            assert peer.receive().kind is Kind.PING
        peer.close()
        assert isinstance(prefill.backend, TcpTransfer)
        sender = prefill.backend._sender
        with sender.arrived:
            assert sender.arrived.wait_for(lambda: ROOM in sender.deserted, WAIT_S)
        prefill.backend.offer(ROOM, 4, 1e9)
        assert prefill.notice().state is TransferState.FAILED

    def test_another_version_is_refused(self) -> None:
        prefill, _ = self.pair()
        host, port = prefill.backend.address.split(":")
        sock = socket.create_connection((host, int(port)))
        peer = Connection(sock, "prefill", Patience(WAIT_S), float("inf"))
        peer.send_json(Kind.HELLO, ROOM, {"protocol": 99})
        with pytest.raises(ConnectionError, match="version 99 of the transfer protocol"):
            peer.receive()
        peer.close()


class Meddler:
    """A proxy in front of a prefill node that spoils what it sends."""

    def __init__(
        self, address: str, *, flip_at: int | None = None, stop_at: int | None = None
    ) -> None:
        """Flips a bit of the byte ``flip_at``, or passes nothing on from ``stop_at``."""
        host, port = address.split(":")
        self._target = (host, int(port))
        self._flip_at, self._stop_at = flip_at, stop_at
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._run)]

    def __enter__(self) -> Meddler:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in [self._listener, *self._sockets]:
            _shut(sock)
        for thread in self._threads:
            thread.join()
        for sock in [self._listener, *self._sockets]:
            sock.close()

    def _run(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._target)
        self._sockets += [near, far]
        back = threading.Thread(target=self._pass_on, args=(near, far, bytes))
        self._threads.append(back)
        back.start()
        self._n = 0
        self._pass_on(far, near, self._spoil)

    def _spoil(self, data: bytes) -> bytes:
        spoiled = bytearray(data)
        if self._flip_at is not None and self._n <= self._flip_at < self._n + len(data):
            spoiled[self._flip_at - self._n] ^= 1
        if self._stop_at is not None:
            spoiled = spoiled[: max(0, self._stop_at - self._n)]
        self._n += len(data)
        return bytes(spoiled)

    def _pass_on(
        self, source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(change(data))
        _shut(source)
        _shut(target)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
