"""A connection waits as long as its peer makes progress; what a peer says is never a traceback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hicache_core.errors import PeerRefused, TransferError
from hicache_core.kv_transfer.wire import Connection, Frame, Kind, Patience, checksum_of

WAIT_S = 30.0
DEEP = b"[" * 200_000


@contextmanager
def connected(patience: Patience) -> Iterator[tuple[Connection, socket.socket]]:
    """A connection, and the socket of its peer."""
    near, far = socket.socketpair()
    connection = Connection(near, "peer", patience, float("inf"))
    try:
        yield connection, far
    finally:
        near.close()
        far.close()


@contextmanager
def dripping(sock: socket.socket, *, reads: bool = False) -> Iterator[None]:
    """Writes, or reads, a byte each 50 ms."""
    over = threading.Event()

    def drip() -> None:
        try:
            while not over.wait(0.05):
                if reads:
                    sock.recv(1)
                else:
                    sock.send(b"\0")
        except OSError:  # the other side has given up
            pass

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_peer_that_drips_rows_is_lost() -> None:
    with (
        connected(Patience(0.3, 1000)) as (connection, far),
        dripping(far),
        pytest.raises(TransferError, match=r"made no progress for 0\.3 s"),
    ):
        connection.receive_into([memoryview(bytearray(1000))])


def test_a_peer_that_drips_a_header_is_lost() -> None:
    with (
        connected(Patience(0.3)) as (connection, far),
        dripping(far),
        pytest.raises(TransferError, match="made no progress"),
    ):
        connection.receive()


def test_a_peer_that_takes_rows_byte_by_byte_is_lost() -> None:
    rows = bytes(16 << 20)  # more than all buffers on the way
    with (
        connected(Patience(0.3, 1 << 20)) as (connection, far),
        dripping(far, reads=True),
        pytest.raises(TransferError, match="made no progress"),
    ):
        connection.send(Frame(Kind.LAYER, 1, nbytes=len(rows)), [rows])


def test_rows_at_the_least_rate_may_take_longer_than_a_silence() -> None:
    """20 bytes a second are asked for and come, for four times the limit of a silence."""
    with connected(Patience(0.3, 20)) as (connection, far), dripping(far):
        connection.receive_into([memoryview(bytearray(24))])


def test_a_burst_buys_no_time_beyond_its_own() -> None:
    now = [0.0]
    near, far = socket.socketpair()
    connection = Connection(near, "peer", Patience(1.0, 1.0), float("inf"), lambda: now[0])
    far.sendall(bytes(1000))
    connection.receive_into([memoryview(bytearray(1000))])
    now[0] = 1.0
    with pytest.raises(TransferError, match="made no progress for 1 s"):
        connection.receive_into([memoryview(bytearray(1))])
    connection.renew()
    far.sendall(b"x")
    connection.receive_into([memoryview(bytearray(1))])
    near.close()
    far.close()


@pytest.mark.parametrize(
    ("kind", "error"), [(Kind.FAILED, TransferError), (Kind.REFUSED, PeerRefused)]
)
def test_words_that_are_no_utf8_are_words(kind: Kind, error: type[Exception]) -> None:
    with connected(Patience(WAIT_S)) as (connection, far):
        Connection(far, "us", Patience(WAIT_S), float("inf")).send_text(kind, 1, b"\xff\xfe bad")
        with pytest.raises(error, match="bad"):
            connection.receive()


@pytest.mark.parametrize("text", [DEEP, b"\xff", b"9" * 5000, b"[]", b"", b'{"a": NaN'])
def test_json_without_sense_is_one_sentence(text: bytes) -> None:
    with connected(Patience(WAIT_S)) as (connection, far):
        writing = threading.Thread(
            target=Connection(far, "us", Patience(WAIT_S), float("inf")).send_text,
            args=(Kind.HELLO, 1, text),
        )
        writing.start()
        with pytest.raises(TransferError, match=r"peer sent no (JSON|object) in HELLO"):
            connection.receive_json(Kind.HELLO)
        writing.join()


def test_more_json_than_is_allowed_is_not_read() -> None:
    with connected(Patience(WAIT_S)) as (connection, far):
        peer = Connection(far, "us", Patience(WAIT_S), float("inf"))
        peer.send(Frame(Kind.HELLO, 1, nbytes=1 << 62, checksum=checksum_of([])))
        with pytest.raises(TransferError, match=f"sent {1 << 62} bytes in HELLO"):
            connection.receive_json(Kind.HELLO)
