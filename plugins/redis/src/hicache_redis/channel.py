"""A connected socket that moves lists of buffers: plain (gather and scatter calls) or TLS."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

Chunk: TypeAlias = bytes | bytearray | memoryview

IOV_MAX = 1024
LEAST_BYTES_PER_S = 8 << 10
"""A server that moves bytes more slowly than this has stalled."""
_WAITALL = int(socket.MSG_WAITALL)  # a plain integer: enums are slower
_JOINED_NBYTES = 16384  # one TLS record


def advance(buffers: list[memoryview], first: int, n_bytes: int) -> int:
    """Removes ``n_bytes`` from ``buffers[first:]``; returns the index of the first that is left.

    Args:
        buffers: what is being moved; changed in place.
        first: index of the first buffer that is left.
        n_bytes: bytes that were moved.
    """
    while n_bytes:
        nbytes = buffers[first].nbytes
        if n_bytes < nbytes:
            buffers[first] = buffers[first][n_bytes:]
            break
        n_bytes -= nbytes
        first += 1
    return first


def _views(buffers: Sequence[Chunk]) -> list[memoryview]:
    """Returns byte views of non-empty chunks: for a socket call, 0 bytes mean the end."""
    return [memoryview(buffer) for buffer in buffers if len(buffer)]


def _lost() -> ConnectionResetError:
    return ConnectionResetError("the server closed the connection")


class Pace:
    """The time that a message may take which needs more than one call of the socket.

    A limit for each wait is not enough: a server that moves a byte now and then would keep a call,
    and the page that it reads into, for hours.
    """

    def __init__(self, timeout_s: float) -> None:
        self._give_up_at = time.monotonic() + timeout_s

    def moved(self, n_bytes: int) -> None:
        """Records what a call has moved.

        Raises:
            TimeoutError: it was less than ``LEAST_BYTES_PER_S``.
        """
        self._give_up_at += n_bytes / LEAST_BYTES_PER_S
        if time.monotonic() > self._give_up_at:
            raise TimeoutError(f"it moved less than {LEAST_BYTES_PER_S} bytes per second")


class Channel(ABC):
    """Bytes to and from one server. One thread at a time.

    Every call raises ``TimeoutError`` if nothing moves for the time limit, or too little
    (``Pace``), and ``OSError`` if the connection is lost. After either it must be closed, since it
    is unknown what was moved.
    """

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s

    def pace(self) -> Pace:
        """Returns the limit for the rest of a message that has begun."""
        return Pace(self._timeout_s)

    @abstractmethod
    def send(self, buffers: Sequence[Chunk]) -> None:
        """Sends all of ``buffers``, in order."""

    @abstractmethod
    def fill(self, segments: Sequence[memoryview]) -> None:
        """Receives until all of ``segments`` are full, in order, and not a byte more."""

    @abstractmethod
    def receive(self, buffer: memoryview) -> int:
        """Receives at least one byte and at most ``buffer``; returns how many bytes."""

    @abstractmethod
    def is_quiet(self) -> bool:
        """Returns whether the connection is open and nothing has arrived; does not block."""


class PlainChannel(Channel):
    """TCP or unix socket: one system call for many buffers, with the GIL released.

    The time limit is the kernel's (SO_RCVTIMEO). A timeout of Python would make the socket
    non-blocking, and each piece that arrives would take two calls and the GIL.
    """

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        super().__init__(sock, timeout_s)
        sock.settimeout(None)
        limit = struct.pack("ll", *divmod(max(1, int(timeout_s * 1e6)), 1_000_000))  # 0 is for ever
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._arrivals = select.poll()
        self._arrivals.register(sock, select.POLLIN)

    def send(self, buffers: Sequence[Chunk]) -> None:
        views = _views(buffers)
        first = 0
        pace: Pace | None = None
        while first < len(views):
            try:
                n_bytes = self._sock.sendmsg(views[first : first + IOV_MAX])
            except BlockingIOError:
                raise TimeoutError("it took no bytes in time") from None
            first = advance(views, first, n_bytes)
            if first < len(views):
                pace = pace or self.pace()
                pace.moved(n_bytes)

    def fill(self, segments: Sequence[memoryview]) -> None:
        views = [segment for segment in segments if segment.nbytes]
        first = 0
        pace: Pace | None = None
        while first < len(views):
            try:
                n_bytes = self._sock.recvmsg_into(views[first : first + IOV_MAX], 0, _WAITALL)[0]
            except BlockingIOError:
                raise TimeoutError("it sent no bytes in time") from None
            if not n_bytes:
                raise _lost()
            first = advance(views, first, n_bytes)
            if first < len(views):
                pace = pace or self.pace()
                pace.moved(n_bytes)

    def receive(self, buffer: memoryview) -> int:
        try:
            n_bytes = self._sock.recv_into(buffer)
        except BlockingIOError:
            raise TimeoutError("it did not answer in time") from None
        if not n_bytes:
            raise _lost()
        return n_bytes

    def is_quiet(self) -> bool:
        return not self._arrivals.poll(0)  # an end of the connection arrives, too


class TlsChannel(Channel):
    """An ``ssl.SSLSocket`` with a timeout; TLS has no gather call, so small buffers are joined."""

    def __init__(self, sock: ssl.SSLSocket, timeout_s: float) -> None:
        super().__init__(sock, timeout_s)
        sock.settimeout(timeout_s)

    def send(self, buffers: Sequence[Chunk]) -> None:
        small = bytearray()
        for view in _views(buffers):
            if view.nbytes < _JOINED_NBYTES:
                small += view
            if small and (view.nbytes >= _JOINED_NBYTES or len(small) >= _JOINED_NBYTES):
                self._sock.sendall(small)
                small.clear()
            if view.nbytes >= _JOINED_NBYTES:
                self._sock.sendall(view)
        if small:
            self._sock.sendall(small)

    def fill(self, segments: Sequence[memoryview]) -> None:
        pace = self.pace()
        for segment in segments:
            start = 0
            while start < segment.nbytes:
                n_bytes = self.receive(segment[start:])
                pace.moved(n_bytes)
                start += n_bytes

    def receive(self, buffer: memoryview) -> int:
        n_bytes = self._sock.recv_into(buffer)
        if not n_bytes:
            raise _lost()
        return n_bytes

    def is_quiet(self) -> bool:
        # Reading is the only way to tell data from a session ticket that TLS 1.3 sends late.
        self._sock.settimeout(0)
        try:
            self._sock.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                self._sock.settimeout(self._timeout_s)
        return False


def channel_of(sock: socket.socket, timeout_s: float) -> Channel:
    """Returns the channel for a connected socket.

    Args:
        sock: its timeout is changed.
        timeout_s: time limit for calls in which nothing moves, in seconds.
    """
    if isinstance(sock, ssl.SSLSocket):
        return TlsChannel(sock, timeout_s)
    return PlainChannel(sock, timeout_s)
