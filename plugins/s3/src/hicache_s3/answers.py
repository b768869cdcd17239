"""Answers of HTTP/1.1: a parser for the little that S3 sends, which fills page memory."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import NamedTuple

from hicache_core.plugin.backends import nbytes_of
from hicache_core.types import Page
from hicache_s3.channel import Channel, Pace

MAX_DRAIN_NBYTES = 64 << 10
"""An unwanted body up to this length is read, so that its connection can be reused."""

_BUFFER_NBYTES = 32 << 10  # also the limit for the headers of an answer
_FIRST_NBYTES = 16 << 10
_NO_BODY = frozenset([204, 304])


class Head(NamedTuple):
    """Status and headers of an answer, before its body is read.

    Attributes:
        status: HTTP status.
        headers: by name in lower case.
        nbytes: length of the body; 0 if it is not announced.
    """

    status: int
    headers: Mapping[str, str]
    nbytes: int


class Answer(NamedTuple):
    """An answer whose body was read or dropped.

    Attributes:
        status: HTTP status.
        headers: by name in lower case.
        body: the segments that were filled; None if the body was dropped.
    """

    status: int
    headers: Mapping[str, str]
    body: Page | None


Choose = Callable[[Head], Page | None]
"""Returns the memory for a body: segments of its exact length, or None to drop it."""


def new_memory(head: Head) -> Page:
    """Returns new memory for a body of any length.

    Raises:
        OSError: there is not so much memory; the announced length is hardly right.
    """
    try:
        return (memoryview(bytearray(head.nbytes)),)
    except (MemoryError, OverflowError) as error:
        text = f"it announces {head.nbytes} bytes, for which there is no memory"
        raise OSError(errno.EMSGSIZE, text) from error


def parse_head(text: bytes) -> tuple[str, Head]:
    """Returns the version of HTTP and the head of an answer.

    Args:
        text: all lines up to the empty one.

    Raises:
        OSError: this is not a head of HTTP/1.
    """
    first, *lines = text.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    status = rest[:3]
    if not version.startswith("HTTP/1.") or not (status.isdecimal() and len(status) == 3):
        raise _malformed(first)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name.strip() == name:
            raise _malformed(line)
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        raise _malformed(f"Content-Length: {length}")
    return version, Head(int(status), headers, int(length))


class Reader:
    """Reads the answers on one connection, one after the other; one thread at a time.

    What comes with the headers is copied from a small buffer. The rest of a body is received where
    it belongs.

    Attributes:
        reusable: whether the last answer was read to its end, and another may follow.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._buffer = bytearray(_BUFFER_NBYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self.reusable = False

    def read(self, method: str, choose: Choose) -> Answer:
        """Reads one answer.

        Args:
            method: of the request.
            choose: returns the memory for the body.

        Raises:
            OSError: the connection was lost or is too slow, or this is not HTTP.
        """
        self.reusable = False
        pace = self._channel.pace()
        version, head = self._head(pace)
        while 100 <= head.status < 200:
            version, head = self._head(pace)
        body, is_whole = self._body(method, head, choose, pace)
        closes = "close" in head.headers.get("connection", "").lower() or version == "HTTP/1.0"
        self.reusable = is_whole and not closes and self._start == self._end
        return Answer(head.status, head.headers, body)

    def _body(
        self, method: str, head: Head, choose: Choose, pace: Pace
    ) -> tuple[Page | None, bool]:
        """Returns the body, and whether it was read to its end."""
        if method == "HEAD" or head.status in _NO_BODY:
            return None, True
        if "chunked" in head.headers.get("transfer-encoding", "").lower():
            return self._chunks(pace)
        if "content-length" not in head.headers:
            return self._until_end(pace)
        place = _start_of_body(head) if head.status >= 300 else choose(head)
        if place is not None:
            self._fill(place, pace)
        rest = head.nbytes - nbytes_of(place or ())
        if rest > MAX_DRAIN_NBYTES:
            return place, False
        if rest:
            self._fill((memoryview(bytearray(rest)),), pace)
        return place, True

    def _head(self, pace: Pace) -> tuple[str, Head]:
        return parse_head(self._until(b"\r\n\r\n", pace))

    def _until(self, mark: bytes, pace: Pace) -> bytes:
        """Returns what comes before ``mark``, and passes over both.

        Args:
            mark: ends it.
            pace: limit of time.
        """
        searched = self._start
        while (found := self._buffer.find(mark, searched, self._end)) < 0:
            searched = max(self._start, self._end - len(mark) + 1)
            if self._start:  # only behind what has been read
                self._view[: self._end - self._start] = self._view[self._start : self._end]
                searched -= self._start
                self._start, self._end = 0, self._end - self._start
            room = self._view[self._end : self._end + _FIRST_NBYTES]
            if not room.nbytes:
                raise _malformed("too long")
            n_bytes = self._channel.receive(room, pace)
            if not n_bytes:
                raise ConnectionResetError("the connection ended before an answer")
            self._end += n_bytes
        text = bytes(self._view[self._start : found])
        self._start = found + len(mark)
        return text

    def _fill(self, segments: Page, pace: Pace) -> None:
        """Fills ``segments`` with what is in the buffer and then from the socket, at ``pace``."""
        rest = list(segments)
        while rest and (n_there := self._end - self._start):
            n_bytes = min(n_there, rest[0].nbytes)
            rest[0][:n_bytes] = self._view[self._start : self._start + n_bytes]
            self._start += n_bytes
            if n_bytes == rest[0].nbytes:
                rest.pop(0)
            else:
                rest[0] = rest[0][n_bytes:]
        if rest:
            self._channel.fill(rest, pace)

    def _chunks(self, pace: Pace) -> tuple[Page, bool]:
        """Returns the start of a body that comes in chunks, as an error's may; and if it is all."""
        body = bytearray()
        while True:
            line = self._until(b"\r\n", pace).partition(b";")[0].strip()
            try:
                nbytes = int(line, 16)
            except ValueError:
                raise _malformed(f"chunk of {line!r} bytes") from None
            if nbytes == 0:
                while self._until(b"\r\n", pace):  # trailers
                    pass
                return (memoryview(body),), True
            if nbytes < 0 or len(body) + nbytes > MAX_DRAIN_NBYTES:
                return (memoryview(body),), False
            chunk = bytearray(nbytes)
            self._fill((memoryview(chunk),), pace)
            self._until(b"\r\n", pace)
            body += chunk

    def _until_end(self, pace: Pace) -> tuple[Page, bool]:
        """Returns the start of a body that ends with the connection."""
        body = bytearray(self._view[self._start : self._end])
        self._start = self._end = 0
        while len(body) < MAX_DRAIN_NBYTES and (n := self._channel.receive(self._view, pace)):
            body += self._view[:n]
        return (memoryview(body)[:MAX_DRAIN_NBYTES],), False


def _start_of_body(head: Head) -> Page:
    """Returns memory for what an error says."""
    return (memoryview(bytearray(min(head.nbytes, MAX_DRAIN_NBYTES))),)


def _malformed(text: str) -> OSError:
    return OSError(errno.EPROTO, f"not an answer of HTTP/1.1: {text[:80]!r}")
