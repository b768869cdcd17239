"""The protocol on a real pair of sockets: what is read, and that not a byte more is."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from hicache_redis.channel import PlainChannel
from hicache_redis.errors import ErrorReply
from hicache_redis.resp import Wire, command, set_command
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.errors import BackendCorrupt
from plugins.redis.tests.pages import blank, filled, holds


class Ends:
    """A wire and the server's end of its connection."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.wire = Wire(PlainChannel(ours, timeout_s=0.2), ours.close)

    def close(self) -> None:
        self.wire.close()
        self.theirs.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


@pytest.fixture
def reading(ends: Ends) -> Callable[[bytes], Wire]:
    """The wire, on which the given bytes have arrived."""

    def arrive(data: bytes) -> Wire:
        ends.theirs.sendall(data)
        return ends.wire

    return arrive


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"+OK\r\n", b"OK"),
        (b":-12\r\n", -12),
        (b"$3\r\nabc\r\n", b"abc"),
        (b"$0\r\n\r\n", b""),
        (b"$-1\r\n", None),
        (b"_\r\n", None),
        (b"*-1\r\n", None),
        (b"*2\r\n:1\r\n*1\r\n+x\r\n", [1, [b"x"]]),
        (b"~1\r\n#t\r\n", [True]),
        (b"%1\r\n+a\r\n,1.5\r\n", [b"a", 1.5]),
        (b"(12345678901234567890\r\n", 12345678901234567890),
        (b"=7\r\ntxt:abc\r\n", b"abc"),
        (b"-OOM full\r\n", ErrorReply("OOM full")),
        (b"!6\r\nERR no\r\n", ErrorReply("ERR no")),
        (b">2\r\n+invalidate\r\n*1\r\n+k\r\n+OK\r\n", b"OK"),
        (b"|1\r\n+ttl\r\n:3\r\n+OK\r\n", b"OK"),
    ],
)
def test_every_kind_of_reply_of_RESP2_and_RESP3_is_read_whole(
    reading: Callable[[bytes], Wire], data: bytes, reply: object
) -> None:
    wire = reading(data)
    assert wire.read_reply() == reply
    assert wire.is_quiet()


def test_error_replies_are_told_from_text() -> None:
    assert ErrorReply("WRONGTYPE of value").code == "WRONGTYPE"


@pytest.mark.parametrize(
    "data",
    [b"HTTP/1.1 400 Bad\r\n", b"$x\r\n", b":1x\r\n", b"$99999999999\r\n", b"?\r\n", b"x" * 20000],
)
def test_what_is_no_reply_is_an_error_and_never_data(
    reading: Callable[[bytes], Wire], data: bytes
) -> None:
    with pytest.raises(BackendCorrupt, match="instead of a reply"):
        reading(data).read_reply()


def test_a_payload_that_does_not_end_where_it_should_is_an_error(
    reading: Callable[[bytes], Wire],
) -> None:
    wire = reading(b"$4\r\nabcdef\r\n")
    assert wire.read_length() == 4
    with pytest.raises(BackendCorrupt):
        wire.read_payload(blank((4,)))


@pytest.mark.parametrize(
    ("reply", "length"),
    [
        (b"$-1\r\n", None),
        (b"$5\r\nabcde\r\n", 5),
        (b"$19999\r\n" + bytes(19999) + b"\r\n", 19999),
        (b"$200000\r\n" + bytes(200000) + b"\r\n", 200000),
        (b"$1048576\r\n" + bytes(1 << 20) + b"\r\n", 1 << 20),
        (b">2\r\n+message\r\n+text\r\n$3\r\nabc\r\n", 3),
    ],
    ids=["absent", "short", "shorter by a byte", "longer head", "long", "behind a push"],
)
def test_a_reply_that_is_no_page_of_that_length_can_still_be_read(
    ends: Ends, reply: bytes, length: int | None
) -> None:
    thread = threading.Thread(target=ends.theirs.sendall, args=(reply + b"+OK\r\n",))
    thread.start()
    try:
        assert not ends.wire.read_page(blank((64, 20000 - 64)), 20000)
        assert ends.wire.read_length() == length
        if length is not None:
            ends.wire.skip_payload(length)
        assert ends.wire.read_reply() == b"OK"
        assert ends.wire.is_quiet()
    finally:
        thread.join()


@contextmanager
def arriving(sizes: Sequence[int], cuts: Sequence[int]) -> Iterator[Ends]:
    """A connection on which payloads of these sizes arrive, in pieces of so many bytes in turn."""
    ends = Ends()
    stream = b"".join(
        b"$%d\r\n%b\r\n" % (size, b"".join(filled(str(n), (size,)))) for n, size in enumerate(sizes)
    )

    def serve() -> None:
        start = n = 0
        while start < len(stream):
            piece = cuts[n % len(cuts)]
            ends.theirs.sendall(stream[start : start + piece])
            start, n = start + piece, n + 1

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield ends
    finally:
        thread.join()
        ends.close()


@given(cuts=st.lists(st.integers(1, 9000), min_size=1, max_size=8))
def test_a_page_is_read_however_it_arrives(cuts: list[int]) -> None:
    """Pages follow each other in pieces of any length; each is read, and not a byte more."""
    sizes = (20000, 100, 70000)
    with arriving(sizes, cuts) as ends:
        for n, size in enumerate(sizes):
            page = blank((64, size - 64))
            if not ends.wire.read_page(page, size):
                assert ends.wire.read_length() == size
                ends.wire.read_payload(page)
            assert holds(str(n), page)
        assert ends.wire.is_quiet()


def test_a_page_whose_head_stalls_times_out(ends: Ends) -> None:
    ends.theirs.sendall(b"$200")
    assert not ends.wire.read_page(blank((20000,)), 20000)
    with pytest.raises(TimeoutError):
        ends.wire.read_length()


def test_an_integer_is_no_head_of_a_payload(reading: Callable[[bytes], Wire]) -> None:
    with pytest.raises(BackendCorrupt):
        reading(b":4\r\n").read_length()


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    wrong=st.sets(st.integers(0, 11)),
)
def test_payloads_fill_their_segments_however_they_arrive(
    sizes: list[int], cuts: list[int], wrong: set[int]
) -> None:
    """Replies arrive in pieces of any length; some are skipped; none moves another by a byte."""
    with arriving(sizes, cuts) as ends:
        for n, size in enumerate(sizes):
            assert ends.wire.read_length() == size
            if n in wrong:
                ends.wire.skip_payload(size)
                continue
            page = blank((size // 3, 0, size - size // 3))
            ends.wire.read_payload(page)
            assert holds(str(n), page)
        assert ends.wire.is_quiet()


@pytest.mark.parametrize("shape", [(5,), (), (0, 3, 0), (1,) * 2500, (64, 3_000_000)])
def test_a_page_of_any_shape_is_sent_as_one_string(ends: Ends, shape: tuple[int, ...]) -> None:
    """Also above IOV_MAX segments, and when the socket takes only a part at a time."""
    page, nbytes = filled("k", shape), sum(shape)
    expected = command(b"SET", b"k", b"".join(page), b"PX", b"1500")
    received = bytearray()

    def read() -> None:
        while len(received) < len(expected):
            received.extend(ends.theirs.recv(1 << 16))

    thread = threading.Thread(target=read)
    thread.start()
    ends.wire.send(set_command(b"k", page, nbytes, 1500))
    thread.join()
    assert received == expected


def test_a_server_that_sends_nothing_or_half_ends_in_a_timeout(ends: Ends) -> None:
    with pytest.raises(TimeoutError):
        ends.wire.read_reply()
    ends.theirs.sendall(b"$10\r\nabc")
    assert ends.wire.read_length() == 10
    with pytest.raises(TimeoutError):
        ends.wire.read_payload(blank((10,)))


def test_a_server_that_takes_nothing_ends_in_a_timeout(ends: Ends) -> None:
    with pytest.raises(TimeoutError):
        ends.wire.send([bytes(1 << 24)])


def test_a_server_that_hangs_up_is_a_lost_connection(ends: Ends) -> None:
    ends.theirs.sendall(b"$10\r\nabc")
    assert ends.wire.read_length() == 10
    ends.theirs.close()
    with pytest.raises(ConnectionError):
        ends.wire.read_payload(blank((10,)))


def test_a_wire_with_unread_bytes_or_without_a_server_is_not_quiet(ends: Ends) -> None:
    assert ends.wire.is_quiet()
    ends.theirs.sendall(b"+LATE\r\n")
    assert not ends.wire.is_quiet()
    assert ends.wire.read_reply() == b"LATE"
    assert ends.wire.is_quiet()
    ends.theirs.close()
    assert not ends.wire.is_quiet()


@pytest.mark.parametrize("message", ["a line", "a page", "a command"])
def test_a_server_that_moves_a_byte_now_and_then_is_given_up(ends: Ends, message: str) -> None:
    """Each wait is shorter than the limit of 0.2 s; all of them would take a day."""
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.05):
            ends.theirs.send(b"x")

    def sip() -> None:
        while not stop.wait(0.05):
            ends.theirs.recv(100)

    calls: dict[str, tuple[Callable[[], object], Callable[[], None]]] = {
        "a line": (ends.wire.read_reply, drip),
        "a page": (lambda: ends.wire.read_payload(blank((1 << 20,))), drip),
        "a command": (lambda: ends.wire.send([bytes(1 << 22)]), sip),
    }
    call, other_end = calls[message]
    thread = threading.Thread(target=other_end)
    thread.start()
    start = time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            call()
    finally:
        stop.set()
        thread.join()
    assert time.monotonic() - start < 20


def test_no_time_limit_is_so_short_that_it_is_none() -> None:
    """The kernel takes a limit of 0 for none at all."""
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError):
        PlainChannel(ours, timeout_s=1e-7).receive(memoryview(bytearray(1)))
