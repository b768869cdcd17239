"""HTTP connections that send from page memory and receive into it."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from hicache_core.errors import BackendTimeout
from hicache_core.plugin.backends import nbytes_of
from hicache_core.types import Page
from hicache_s3.answers import Answer, Choose, Reader
from hicache_s3.channel import Channel, channel_of


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


class _Wire:
    """One connection: what sends requests on it, and what reads the answers."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.reader = Reader(channel)

    def converse(self, method: str, request: Page, choose: Choose) -> tuple[Answer, bool]:
        """Sends a request and reads its answer.

        Args:
            method: of HTTP.
            request: the headers and the body.
            choose: returns the memory for the body of the answer.

        Returns:
            The answer, and whether the connection can be used again.
        """
        sent = True
        try:
            self.channel.send(request, self.channel.pace())
        except (BrokenPipeError, ConnectionResetError):
            sent = False  # a server that refuses a body answers before it has read all of it
        answer = self.reader.read(method, choose)
        return answer, sent and self.reader.reusable


class Connections:
    """Up to ``limit`` connections to one server, kept open. Any thread may call any method."""

    def __init__(self, address: Address, limit: int) -> None:
        self.address = address
        self._idle: list[_Wire] = []
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
            OSError: the server cannot be reached, or was lost.
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
                except OSError:
                    self._drop_idle()
            return self._converse(self._connect(), method, request, choose)
        finally:
            self._slots.release()

    def close(self) -> None:
        """Closes idle connections now, and the others after their answer."""
        with self._lock:
            self._closed = True
        self._drop_idle()

    def _take(self) -> _Wire | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _drop_idle(self) -> None:
        """Closes idle connections: they are likely in the same state as the failed one."""
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.channel.close()

    def _connect(self) -> _Wire:
        address = self.address
        sock = socket.create_connection((address.host, address.port), address.connect_timeout_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.tls is not None:
                sock = address.tls.wrap_socket(sock, server_hostname=address.host)
            wire = _Wire(channel_of(sock, address.read_timeout_s))
        except BaseException:
            sock.close()
            raise
        with self._lock:
            self.n_opened += 1
        return wire

    def _converse(self, wire: _Wire, method: str, request: Page, choose: Choose) -> Answer:
        keep = False
        try:
            answer, keep = wire.converse(method, request, choose)
            return answer
        finally:
            self._give_back(wire, keep)

    def _give_back(self, wire: _Wire, keep: bool) -> None:
        with self._lock:
            if keep and not self._closed:
                self._idle.append(wire)
                return
        wire.channel.close()
