"""A connected socket that moves lists of buffers within limits of time: plain TCP, or TLS."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

LEAST_BYTES_PER_S = 8 << 10
"""An answer that is slower than this has stalled."""

_MAX_VECTORS = 512  # IOV_MAX is 1024
_WAITALL = int(socket.MSG_WAITALL)  # a plain integer: the enum takes a microsecond to combine
_N_WAITS = 4


class Pace:
    """The time that a message may take.

    A limit for each wait is not enough: a server that moves a byte now and then would keep a call,
    and the pages that it reads or writes, for hours.
    """

    def __init__(self, wait_s: float) -> None:
        """Starts the clock.

        Args:
            wait_s: how long nothing may move.
        """
        self._wait_s = wait_s
        self._nbytes = 0
        self._began = self._moved_at = time.monotonic()

    def moved(self, nbytes: int) -> None:
        """Records what has moved."""
        self._nbytes += nbytes
        self._moved_at = time.monotonic()

    def waited(self) -> None:
        """Records that nothing has moved for a part of the limit.

        Raises:
            TimeoutError: nothing has moved for all of it.
        """
        quiet_s = time.monotonic() - self._moved_at
        if quiet_s >= self._wait_s:
            raise TimeoutError(f"nothing in {quiet_s:.1f} s")

    def left_s(self) -> float:
        """Returns the limit for the next wait.

        Raises:
            TimeoutError: less than ``LEAST_BYTES_PER_S`` have moved.
        """
        took_s = time.monotonic() - self._began
        left_s = self._wait_s + self._nbytes / LEAST_BYTES_PER_S - took_s
        if left_s <= 0:
            raise TimeoutError(f"{self._nbytes} bytes in {took_s:.1f} s")
        return min(left_s, self._wait_s)


class Channel(ABC):
    """Bytes to and from one server; one thread at a time.

    Every call raises ``TimeoutError`` if nothing moves for the time limit, or too little
    (``Pace``), and ``OSError`` if the connection is lost. After either it must be closed.
    """

    def __init__(self, sock: socket.socket, wait_s: float) -> None:
        self.sock = sock
        self._wait_s = wait_s

    def pace(self) -> Pace:
        """Returns the limit for a message that begins now."""
        return Pace(self._wait_s)

    def close(self) -> None:
        """Closes the socket."""
        self.sock.close()

    @abstractmethod
    def send(self, buffers: Iterable[memoryview], pace: Pace) -> None:
        """Sends all of ``buffers`` in order, at ``pace``."""

    @abstractmethod
    def receive(self, buffer: memoryview, pace: Pace) -> int:
        """Receives at most ``buffer``, at ``pace``; returns how many bytes, 0 at the end."""

    @abstractmethod
    def fill(self, segments: Sequence[memoryview], pace: Pace) -> None:
        """Receives until all of ``segments`` are full, in order, at ``pace``; not a byte more."""


class PlainChannel(Channel):
    """TCP: one system call for many buffers, without the GIL until all of them are full.

    The time limit is the kernel's. A timeout of Python would make the socket non-blocking, and
    each piece that arrives would take two system calls and the GIL. A call that has moved a part
    when its limit is over does not tell when the last byte came, so the limit of a call is a part
    of the whole.
    """

    def __init__(self, sock: socket.socket, wait_s: float) -> None:
        super().__init__(sock, wait_s)
        sock.settimeout(None)
        limit_us = max(1, int(wait_s / _N_WAITS * 1e6))  # 0 is for ever
        limit = struct.pack("ll", *divmod(limit_us, 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, buffers: Iterable[memoryview], pace: Pace) -> None:
        self._move(buffers, pace, self.sock.sendmsg)

    def receive(self, buffer: memoryview, pace: Pace) -> int:
        while True:
            pace.left_s()
            try:
                n_bytes = self.sock.recv_into(buffer)
            except BlockingIOError:
                pace.waited()
            else:
                pace.moved(n_bytes)
                return n_bytes

    def fill(self, segments: Sequence[memoryview], pace: Pace) -> None:
        receive = self.sock.recvmsg_into
        self._move(segments, pace, lambda views: _some(receive(views, 0, _WAITALL)[0]))

    @staticmethod
    def _move(
        buffers: Iterable[memoryview], pace: Pace, call: Callable[[list[memoryview]], int]
    ) -> None:
        """Calls with the buffers that are left until there are none."""
        views = [buffer for buffer in buffers if buffer.nbytes]
        first = 0
        while first < len(views):
            pace.left_s()
            try:
                n_bytes = call(views[first : first + _MAX_VECTORS])
            except BlockingIOError:
                pace.waited()
                continue
            pace.moved(n_bytes)
            while n_bytes and n_bytes >= views[first].nbytes:
                n_bytes -= views[first].nbytes
                first += 1
            if n_bytes:
                views[first] = views[first][n_bytes:]


class TlsChannel(Channel):
    """An ``ssl.SSLSocket``, which has no call for many buffers."""

    def send(self, buffers: Iterable[memoryview], pace: Pace) -> None:
        for buffer in buffers:
            start = 0
            while start < buffer.nbytes:
                self.sock.settimeout(pace.left_s())
                n_bytes = self.sock.send(buffer[start:])
                pace.moved(n_bytes)
                start += n_bytes

    def receive(self, buffer: memoryview, pace: Pace) -> int:
        self.sock.settimeout(pace.left_s())
        n_bytes = self.sock.recv_into(buffer)
        pace.moved(n_bytes)
        return n_bytes

    def fill(self, segments: Sequence[memoryview], pace: Pace) -> None:
        for segment in segments:
            start = 0
            while start < segment.nbytes:
                start += _some(self.receive(segment[start:], pace))


def _some(n_bytes: int) -> int:
    if not n_bytes:
        raise ConnectionResetError("the connection ended in the middle of an object")
    return n_bytes


def channel_of(sock: socket.socket, wait_s: float) -> Channel:
    """Returns the channel for a connected socket.

    Args:
        sock: its timeout is changed.
        wait_s: limit for each wait in which nothing moves.
    """
    return (TlsChannel if isinstance(sock, ssl.SSLSocket) else PlainChannel)(sock, wait_s)
