"""Answers of HTTP/1.1, however they come in: in pieces, in chunks, one behind the other."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from hicache_s3.answers import (
    MAX_DRAIN_NBYTES,
    Answer,
    Choose,
    Head,
    Reader,
    new_memory,
    parse_head,
)
from hicache_s3.channel import channel_of

from hicache_core.types import Page

PAGE = bytes(range(256)) * 400  # longer than any buffer of the reader
OK = b"HTTP/1.1 200 OK\r\n"


def answer(body: bytes, head: bytes = OK, headers: bytes = b"") -> bytes:
    return head + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


class Server:
    """The other end of a connection, and what reads the answers from ours."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.reader = Reader(channel_of(self._ours, 2.0))

    def read(self, method: str = "GET", choose: Choose = new_memory) -> tuple[Answer, bytes]:
        found = self.reader.read(method, choose)
        return found, b"".join(found.body or ())

    def close(self) -> None:
        self._ours.close()
        self.theirs.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with contextlib.closing(Server()) as made:
        yield made


def segments(head: Head) -> Page:
    """Memory in uneven pieces, some of them empty."""
    sizes, rest = [64, 0, 1000, 0], head.nbytes - 1064
    return tuple(memoryview(bytearray(n)) for n in [*sizes, rest // 2, rest - rest // 2])


@pytest.mark.parametrize("nbytes", [1066, 5000, 16384, len(PAGE)])
def test_a_body_fills_its_segments_and_the_connection_stays(server: Server, nbytes: int) -> None:
    for _ in range(3):
        server.theirs.sendall(answer(PAGE[:nbytes]))
        found, body = server.read(choose=segments)
        assert (found.status, body) == (200, PAGE[:nbytes])
        assert found.body is not None
        assert len(found.body) == 6
        assert server.reader.reusable


def test_headers_are_found_whatever_their_case_and_repeated_ones_are_joined(server: Server) -> None:
    said = b'ETag: "Ab"\r\nX-AMZ-meta-A:  b c \r\nvary: x\r\nVary: y\r\n'
    server.theirs.sendall(answer(b"", headers=said))
    headers = server.read()[0].headers
    assert headers["etag"] == '"Ab"'
    assert headers["x-amz-meta-a"] == "b c"
    assert headers["vary"] == "x, y"


def test_an_unwanted_body_is_passed_over_if_it_is_short(server: Server) -> None:
    for nbytes in (0, 10, MAX_DRAIN_NBYTES, MAX_DRAIN_NBYTES + 1):
        server.theirs.sendall(answer(PAGE[:nbytes]))
        assert server.read(choose=lambda _: None)[0].body is None
        assert server.reader.reusable == (nbytes <= MAX_DRAIN_NBYTES)


def test_heads_without_a_body_are_followed_by_the_next_answer(server: Server) -> None:
    continues = b"HTTP/1.1 100 Continue\r\n\r\n"
    nothing = b"HTTP/1.1 204 No Content\r\n\r\n"
    head_only = OK + b"Content-Length: 12345\r\n\r\n"
    for text, method, status in (
        (nothing, "DELETE", 204),
        (head_only, "HEAD", 200),
        (continues + answer(b"x"), "GET", 200),
    ):
        server.theirs.sendall(text)
        assert server.read(method)[0].status == status
        assert server.reader.reusable


def test_an_error_may_come_in_chunks_or_end_with_the_connection(server: Server) -> None:
    busy = b"HTTP/1.1 503 Slow Down\r\n"
    chunks = b"5\r\n<Code\r\n0b;x=y\r\n>SlowDown</\r\n0\r\na: b\r\n\r\n"
    server.theirs.sendall(busy + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    found, body = server.read()
    assert (found.status, body, server.reader.reusable) == (503, b"<Code>SlowDown</", True)
    for body, stays in ((PAGE, True), (PAGE * 2, False)):
        server.theirs.sendall(answer(body, busy))
        assert server.read()[1] == PAGE[:MAX_DRAIN_NBYTES]
        assert server.reader.reusable == stays

    with contextlib.closing(Server()) as other:
        other.theirs.sendall(busy + b"Connection: close\r\n\r\n" + PAGE[:20_000])
        other.theirs.shutdown(socket.SHUT_WR)
        assert other.read()[1] == PAGE[:20_000]
        assert not other.reader.reusable


@pytest.mark.parametrize(
    "text",
    [
        answer(b"x", headers=b"Connection: close\r\n"),
        answer(b"x", headers=b"Connection: TE, Close\r\n"),
        answer(b"x", head=b"HTTP/1.0 200 OK\r\n"),
        answer(b"x") + b"y",
    ],
    ids=["close", "close among others", "HTTP/1.0", "more than announced"],
)
def test_a_connection_that_will_not_do_for_another_request_is_not_kept(
    server: Server, text: bytes
) -> None:
    server.theirs.sendall(text)
    assert server.read()[1] == b"x"
    assert not server.reader.reusable


@pytest.mark.parametrize(
    "head",
    [
        b"SSH-2.0-OpenSSH",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1",
        b"HTTP/2 200",
        b"HTTP/1.1 200 OK\r\nno colon",
        b"HTTP/1.1 200 OK\r\n folded: line",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6",
    ],
)
def test_what_is_not_a_head_of_http_is_an_error_that_shows_it(head: bytes) -> None:
    with pytest.raises(OSError, match=r"not an answer of HTTP/1\.1"):
        parse_head(head)


def test_headers_without_end_are_an_error(server: Server) -> None:
    server.theirs.sendall(OK + b"a: b\r\n" * 10_000)
    with pytest.raises(OSError, match="too long"):
        server.read()


@pytest.mark.parametrize("nbytes", [0, 10, 5000])
def test_an_end_in_the_middle_is_a_lost_connection(server: Server, nbytes: int) -> None:
    server.theirs.sendall(answer(PAGE[:6000])[:nbytes])
    server.theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionResetError):
        server.read()
