"""An emulation of an S3 server, for answers that a real one cannot be made to give.

It answers each request with the next of the prepared answers, whatever was asked.
"""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple


class Reply(NamedTuple):
    """One prepared answer.

    Attributes:
        status: HTTP status.
        body: what follows the headers.
        headers: beside Content-Length.
        nbytes: announced length, where it differs from that of the body.
        delay_s: how long it lets the client wait.
        drip_s: how long it pauses behind each byte of the headers.
    """

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    nbytes: int | None = None
    delay_s: float = 0.0
    drip_s: float = 0.0


def error(status: int, code: str, extra: str = "") -> Reply:
    """An error as S3 writes it."""
    said = f"<Code>{code}</Code><Message>as emulated</Message>{extra}"
    return Reply(status, f"<?xml version='1.0'?><Error>{said}</Error>".encode())


ABSENT = error(404, "NoSuchKey")


class Emulation:
    """Answers with ``replies`` in turn, then with ``last`` for ever."""

    def __init__(self, last: Reply = ABSENT, *, hang_up: bool = False) -> None:
        """Listens on a free loopback port; ``hang_up`` closes each connection without a word."""
        self.replies: list[Reply] = []
        self.last = last
        self.hang_up = hang_up
        self.n_requests = 0
        self.on_request: Callable[[], None] = lambda: None
        emulation = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                emulation._answer(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815 - as the base asks

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Ends it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        self.n_requests += 1
        self.on_request()
        reply = self.replies.pop(0) if self.replies else self.last
        request.rfile.read(int(request.headers.get("Content-Length", "0")))
        time.sleep(reply.delay_s)
        if reply.drip_s:
            with contextlib.suppress(ConnectionError):
                for byte in b"HTTP/1.1 200 OK\r\n" + b"x-y: z\r\n" * 1000:
                    request.wfile.write(bytes([byte]))
                    time.sleep(reply.drip_s)
            return
        request.send_response(reply.status)
        for name, value in reply.headers:
            request.send_header(name, value)
        length = len(reply.body) if reply.nbytes is None else reply.nbytes
        request.send_header("Content-Length", str(length))
        request.end_headers()
        if request.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # the client has seen enough
                request.wfile.write(reply.body)
        if self.hang_up or length != len(reply.body):
            request.close_connection = True
            with contextlib.suppress(OSError):  # the client has gone already
                request.connection.shutdown(socket.SHUT_WR)
