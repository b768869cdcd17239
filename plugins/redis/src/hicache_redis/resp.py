"""The Redis protocol on a channel: commands as bytes, replies directly into page memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from hicache_core.errors import BackendCorrupt
from hicache_core.types import Page
from hicache_redis.channel import Channel, Chunk, Pace
from hicache_redis.errors import ErrorReply

Reply: TypeAlias = "int | float | bool | bytes | ErrorReply | list[Reply] | None"

MAX_BULK_NBYTES = 512 * 2**20  # the protocol's own limit
_BUFFER_NBYTES = 16384
_CRLF = b"\r\n"


def _error(text: bytes | bytearray) -> ErrorReply:
    return ErrorReply(text.decode(errors="replace"))


# Replies that are one line: what the rest of the line means.
_SIMPLE: dict[bytes, Callable[[bytes], Reply]] = {
    b"+": bytes,
    b"-": _error,
    b":": int,
    b"(": int,
    b"_": lambda _: None,
    b"#": lambda body: body == b"t",
    b",": float,
}


def command(*words: bytes) -> bytes:
    """Returns a command of the protocol: an array of bulk strings."""
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


def set_command(key: bytes, page: Page, nbytes: int, ttl_ms: int | None) -> list[Chunk]:
    """Returns ``SET key page [PX ttl_ms]`` as buffers, with the segments of the page.

    Args:
        key: in the database.
        page: segments of ``nbytes`` bytes in total.
        nbytes: length of the object.
        ttl_ms: lifetime of the object in milliseconds; None for no limit.
    """
    n_words, tail = 3, _CRLF
    if ttl_ms is not None:
        n_words, tail = 5, b"\r\n$2\r\nPX\r\n$%d\r\n%d\r\n" % (len(str(ttl_ms)), ttl_ms)
    head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (n_words, len(key), key, nbytes)
    return [head, *page, tail]


class Wire:
    """A connection that speaks RESP2 or RESP3. One thread at a time.

    Lines are read through a buffer of 16 KiB. At most that much of a payload passes through it; the
    rest is received directly in its place.

    After any exception the wire must be closed: requests and replies are out of step.
    """

    def __init__(self, channel: Channel, close: Callable[[], None]) -> None:
        """Wraps a connection after its handshake.

        Args:
            channel: the connection.
            close: ends it.
        """
        self._channel = channel
        self.close = close
        self._buffer = bytearray(_BUFFER_NBYTES)
        self._view = memoryview(self._buffer)
        self._start = 0  # what has arrived and is not yet read: buffer[start:stop]
        self._stop = 0
        self._end = memoryview(bytearray(2))

    def send(self, buffers: Sequence[Chunk]) -> None:
        """Sends commands."""
        self._channel.send(buffers)

    def call(self, *words: bytes) -> Reply:
        """Sends one command and reads its reply."""
        self.send([command(*words)])
        return self.read_reply()

    def is_quiet(self) -> bool:
        """Returns whether the connection is open without outstanding replies; does not block."""
        return self._start == self._stop and self._channel.is_quiet()

    def read_page(self, page: Sequence[memoryview], nbytes: int) -> bool:
        """Reads a reply into a page if it is a bulk string of exactly the page's length.

        Args:
            page: its segments.
            nbytes: their length in total.

        Returns:
            False if the reply is another one. Then ``read_length`` must read it.
        """
        if nbytes > _BUFFER_NBYTES and self._start == self._stop:
            # Only the head passes through the buffer: it is known how long that is.
            head = b"$%d\r\n" % nbytes
            self._start, self._stop = 0, self._channel.receive(self._view[: len(head)])
            if self._buffer.startswith(head) and self._stop == len(head):
                self._start = self._stop
                self.read_payload(page)
                return True
        return False

    def read_length(self) -> int | ErrorReply | None:
        """Reads the head of a bulk string; returns its length, None for null, or an error reply.

        The payload of that length must be read next, by ``read_payload`` or ``skip_payload``.

        Raises:
            BackendCorrupt: the reply is of another kind.
        """
        line = self._reply_line()
        kind = line[:1]
        if kind == b"$":
            length = self._number(line)
            return None if length < 0 else length
        if kind == b"_":
            return None
        if kind == b"-":
            return _error(line[1:])
        raise _garbage(line)

    def read_payload(self, page: Sequence[memoryview]) -> None:
        """Reads a payload of exactly the page's length into its segments."""
        rest = [*page, self._end]
        first = 0
        while first < len(rest) and self._start < self._stop:
            segment = rest[first]
            n_bytes = min(self._stop - self._start, segment.nbytes)
            segment[:n_bytes] = self._view[self._start : self._start + n_bytes]
            self._start += n_bytes
            if n_bytes < segment.nbytes:
                rest[first] = segment[n_bytes:]
            else:
                first += 1
        if first < len(rest):
            self._channel.fill(rest[first:])
        if self._end != _CRLF:
            raise _garbage(bytes(self._end))

    def skip_payload(self, nbytes: int) -> None:
        """Reads a payload of ``nbytes`` bytes and drops it."""
        scrap = memoryview(bytearray(min(nbytes, 1 << 18)))
        while nbytes > len(scrap):
            n_buffered = min(self._stop - self._start, nbytes)
            self._start += n_buffered
            nbytes -= n_buffered
            if not n_buffered:
                self._channel.fill([scrap])
                nbytes -= len(scrap)
        self.read_payload([scrap[:nbytes]])

    def read_reply(self) -> Reply:
        """Reads one reply of any kind; returns maps as flat lists."""
        line = self._reply_line()
        kind, body = line[:1], line[1:]
        try:
            if kind in _SIMPLE:
                return _SIMPLE[kind](body)
        except ValueError:
            raise _garbage(line) from None
        return self._read_long(line)

    def _read_long(self, line: bytes) -> Reply:
        """Reads the rest of a reply with a length in its head."""
        kind, length = line[:1], self._number(line)
        if kind in b"$=!":
            if length < 0:
                return None
            value = bytearray(length)
            self.read_payload([memoryview(value)])
            if kind == b"!":
                return _error(value)
            return bytes(value[4:] if kind == b"=" else value)
        if kind in b"*~":
            return None if length < 0 else [self.read_reply() for _ in range(length)]
        if kind == b"%":
            return [self.read_reply() for _ in range(2 * length)]
        raise _garbage(line)

    def _reply_line(self) -> bytes:
        """Returns the first line of the next reply; drops push messages between replies."""
        while True:
            line = self._line()
            if line[:1] == b">":
                for _ in range(self._number(line)):
                    self.read_reply()
            elif line[:1] == b"|":
                for _ in range(2 * self._number(line)):
                    self.read_reply()
            else:
                return line

    def _line(self) -> bytes:
        pace: Pace | None = None
        while (end := self._buffer.find(_CRLF, self._start, self._stop)) < 0:
            began = self._start < self._stop
            n_bytes = self._receive()
            if began:
                pace = pace or self._channel.pace()
                pace.moved(n_bytes)
        line = bytes(self._view[self._start : end])
        self._start = end + 2
        return line

    def _receive(self) -> int:
        """Appends what has arrived to the buffer; returns how many bytes."""
        n_unread = self._stop - self._start
        if n_unread == _BUFFER_NBYTES:
            raise _garbage(bytes(self._view[self._start : self._start + 64]))
        if self._start:
            self._view[:n_unread] = bytes(self._view[self._start : self._stop])
            self._start, self._stop = 0, n_unread
        n_bytes = self._channel.receive(self._view[self._stop :])
        self._stop += n_bytes
        return n_bytes

    @staticmethod
    def _number(line: bytes) -> int:
        try:
            number = int(line[1:])
        except ValueError:
            raise _garbage(line) from None
        if line[:1] == b"$" and number > MAX_BULK_NBYTES:
            raise _garbage(line)
        return number


def _garbage(line: bytes) -> BackendCorrupt:
    return BackendCorrupt(
        f"the server sent {line[:32]!r} instead of a reply; check that it is a Redis server and "
        "that no proxy changes its replies"
    )
