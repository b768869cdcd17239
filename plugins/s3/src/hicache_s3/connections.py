"""HTTP connections that send from page memory and receive into it."""

from __future__ import annotations

import errno
import http.client
import io
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from hicache_core.errors import BackendTimeout
from hicache_core.plugin.backends import nbytes_of
from hicache_core.types import Page

MAX_DRAIN_NBYTES = 64 << 10
"""An unwanted body up to this length is read, so that its connection can be reused."""

LEAST_BYTES_PER_S = 8 << 10
"""An answer that is slower than this has stalled."""

_MAX_VECTORS = 512  # IOV_MAX is 1024
_NO_BODY = frozenset([204, 304])


class Head(NamedTuple):
    """Status and headers of an answer, before its body is read.

    Attributes:
        status: HTTP status.
        headers: case-insensitive.
        nbytes: length of the body.
    """

    status: int
    headers: http.client.HTTPMessage
    nbytes: int


class Answer(NamedTuple):
    """An answer whose body was read or dropped.

    Attributes:
        status: HTTP status.
        headers: case-insensitive.
        body: the segments that were filled; None if the body was dropped.
    """

    status: int
    headers: http.client.HTTPMessage
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


@dataclass(frozen=True)
class Address:
    """The address of the server, and time limits.

    Attributes:
        host: name or address.
        port: TCP port.
        tls: context for https, or None.
        connect_timeout_s: limit for one connection.
        read_timeout_s: limit for each wait for bytes.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None
    connect_timeout_s: float
    read_timeout_s: float


class Connections:
    """Up to ``limit`` connections to one server, kept open. Any thread may call any method."""

    def __init__(self, address: Address, limit: int) -> None:
        self.address = address
        self._idle: list[socket.socket] = []
        self._slots = threading.BoundedSemaphore(limit)
        self._lock = threading.Lock()
        self._closed = False
        self.n_opened = 0

    def exchange(
        self, method: str, target: str, headers: Mapping[str, str], body: Page, choose: Choose
    ) -> Answer:
        """Sends a request and reads its answer.

        The server may have closed a connection that was kept open. A request that is lost on such
        a connection is sent again on a new one.

        Args:
            method: of HTTP.
            target: path and query.
            headers: signed.
            body: segments to send; only read.
            choose: returns the memory for the body of the answer.

        Raises:
            OSError, http.client.HTTPException: the server cannot be reached, or was lost.
        """
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        length = f"Content-Length: {nbytes_of(body)}\r\n" if method in ("PUT", "POST") else ""
        request = (memoryview(f"{method} {target} HTTP/1.1\r\n{head}{length}\r\n".encode()), *body)
        limit_s = self.address.connect_timeout_s + self.address.read_timeout_s
        if not self._slots.acquire(timeout=limit_s):
            raise BackendTimeout(
                f"no connection became free in {limit_s:g} s; raise max_connections"
            )
        try:
            kept = self._take()
            if kept is not None:
                try:
                    return self._converse(kept, method, request, choose)
                except TimeoutError:
                    raise
                except (OSError, http.client.HTTPException):
                    self._drop_idle()
            return self._converse(self._connect(), method, request, choose)
        finally:
            self._slots.release()

    def close(self) -> None:
        """Closes idle connections now, and the others after their answer."""
        with self._lock:
            self._closed = True
        self._drop_idle()

    def _take(self) -> socket.socket | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _drop_idle(self) -> None:
        """Closes idle connections: they are likely in the same state as the failed one."""
        with self._lock:
            idle, self._idle = self._idle, []
        for sock in idle:
            sock.close()

    def _connect(self) -> socket.socket:
        address = self.address
        sock = socket.create_connection((address.host, address.port), address.connect_timeout_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.tls is not None:
                sock = address.tls.wrap_socket(sock, server_hostname=address.host)
        except BaseException:
            sock.close()
            raise
        with self._lock:
            self.n_opened += 1
        return sock

    def _converse(self, sock: socket.socket, method: str, request: Page, choose: Choose) -> Answer:
        keep = False
        try:
            try:
                send(sock, request, self.address.read_timeout_s)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a server that refuses a body answers before it has read all of it
            else:
                keep = True
            source = cast(socket.socket, _Paced(sock, self.address.read_timeout_s))
            with http.client.HTTPResponse(source, method=method) as response:
                response.begin()
                answer, read_whole = _read(response, method, choose)
                keep = keep and read_whole and not response.will_close
            return answer
        except BaseException:
            keep = False
            raise
        finally:
            self._give_back(sock, keep)

    def _give_back(self, sock: socket.socket, keep: bool) -> None:
        with self._lock:
            if keep and not self._closed:
                self._idle.append(sock)
                return
        sock.close()


class _Pace:
    """The time that a message may take.

    A limit for each wait is not enough: a server that moves a byte now and then would keep a call,
    and the pages that it reads or writes, for hours.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._began = time.monotonic()
        self._nbytes = 0

    def moved(self, nbytes: int) -> None:
        """Records what has moved."""
        self._nbytes += nbytes

    def wait_s(self) -> float:
        """Returns the limit for the next wait.

        Raises:
            TimeoutError: less than ``LEAST_BYTES_PER_S`` have moved.
        """
        took_s = time.monotonic() - self._began
        left_s = self._wait_s + self._nbytes / LEAST_BYTES_PER_S - took_s
        if left_s <= 0:
            raise TimeoutError(f"{self._nbytes} bytes in {took_s:.1f} s")
        return min(left_s, self._wait_s)


class _Paced(io.RawIOBase):
    """Reads one answer from a socket, and gives up if it is too slow."""

    def __init__(self, sock: socket.socket, wait_s: float) -> None:
        self._sock = sock
        self._pace = _Pace(wait_s)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """The method of a socket that ``HTTPResponse`` calls."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        self._sock.settimeout(self._pace.wait_s())
        n = self._sock.recv_into(buffer)
        self._pace.moved(n)
        return n


def send(sock: socket.socket, buffers: Iterable[memoryview], wait_s: float) -> None:
    """Sends ``buffers`` in order, in as few calls as possible.

    Args:
        sock: its timeout is changed.
        buffers: what to send.
        wait_s: limit for each wait.

    Raises:
        TimeoutError: the server takes nothing, or too little.
    """
    pace = _Pace(wait_s)
    if isinstance(sock, ssl.SSLSocket):  # it has no sendmsg
        for buffer in buffers:
            start = 0
            while start < buffer.nbytes:
                sock.settimeout(pace.wait_s())
                n = sock.send(buffer[start:])
                pace.moved(n)
                start += n
        return
    waiting = [buffer for buffer in buffers if buffer.nbytes]
    for start in range(0, len(waiting), _MAX_VECTORS):
        _send_vectors(sock, waiting[start : start + _MAX_VECTORS], pace)


def _send_vectors(sock: socket.socket, vectors: Sequence[memoryview], pace: _Pace) -> None:
    vectors = list(vectors)
    first = 0
    while first < len(vectors):
        sock.settimeout(pace.wait_s())
        sent = sock.sendmsg(itertools.islice(vectors, first, None))
        pace.moved(sent)
        while first < len(vectors) and sent >= vectors[first].nbytes:
            sent -= vectors[first].nbytes
            first += 1
        if sent:
            vectors[first] = vectors[first][sent:]


def _read(response: http.client.HTTPResponse, method: str, choose: Choose) -> tuple[Answer, bool]:
    """Returns the answer, and whether its body was read to the end."""
    status, headers = response.status, response.msg
    if method == "HEAD" or status in _NO_BODY:
        response.read()
        return Answer(status, headers, None), True
    if status >= 300 or response.length is None:  # an error's body may come in chunks
        body = memoryview(response.read(MAX_DRAIN_NBYTES))
        return Answer(status, headers, (body,)), response.isclosed()
    place = choose(Head(status, headers, response.length))
    if place is None:
        if response.length > MAX_DRAIN_NBYTES:
            return Answer(status, headers, None), False
        response.read()
        return Answer(status, headers, None), True
    for segment in place:
        _fill(response, segment)
    response.read()
    return Answer(status, headers, place), True


def _fill(response: http.client.HTTPResponse, segment: memoryview) -> None:
    start = 0
    while start < segment.nbytes:
        n = response.readinto(segment[start:])
        if not n:
            raise ConnectionResetError("the connection ended in the middle of an object")
        start += n
