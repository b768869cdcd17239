"""A connected socket that moves lists of buffers: plain (gather and scatter calls) or TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

Chunk: TypeAlias = bytes | bytearray | memoryview

IOV_MAX = 1024
# Plain integers: these flags are enums, which take a microsecond to combine.
_PEEK = int(socket.MSG_PEEK) | int(socket.MSG_DONTWAIT)
_WAITALL = int(socket.MSG_WAITALL)
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


class Channel(ABC):
    """Bytes to and from one server. One thread at a time.

    Every call raises ``TimeoutError`` if nothing moves for the time limit, and ``OSError`` if the
    connection is lost. After either it must be closed, since it is unknown what was moved.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

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
        super().__init__(sock)
        sock.settimeout(None)
        limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, buffers: Sequence[Chunk]) -> None:
        views = _views(buffers)
        first = 0
        while first < len(views):
            try:
                n_bytes = self._sock.sendmsg(views[first : first + IOV_MAX])
            except BlockingIOError:
                raise TimeoutError("it took no bytes in time") from None
            first = advance(views, first, n_bytes)

    def fill(self, segments: Sequence[memoryview]) -> None:
        views = _views(segments)
        first = 0
        while first < len(views):
            try:
                n_bytes = self._sock.recvmsg_into(views[first : first + IOV_MAX], 0, _WAITALL)[0]
            except BlockingIOError:
                raise TimeoutError("it sent no bytes in time") from None
            if not n_bytes:
                raise _lost()
            first = advance(views, first, n_bytes)

    def receive(self, buffer: memoryview) -> int:
        try:
            n_bytes = self._sock.recv_into(buffer)
        except BlockingIOError:
            raise TimeoutError("it did not answer in time") from None
        if not n_bytes:
            raise _lost()
        return n_bytes

    def is_quiet(self) -> bool:
        try:
            self._sock.recv(1, _PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


class TlsChannel(Channel):
    """An ``ssl.SSLSocket`` with a timeout; TLS has no gather call, so small buffers are joined."""

    def __init__(self, sock: ssl.SSLSocket, timeout_s: float) -> None:
        super().__init__(sock)
        self._timeout_s = timeout_s
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
        for segment in segments:
            start = 0
            while start < segment.nbytes:
                start += self.receive(segment[start:])

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
