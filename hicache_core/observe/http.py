"""The status server: metrics and status of a cache over HTTP, for engines without a server."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from hicache_core.errors import ConfigError
from hicache_core.observe.page.answers import (
    HEADERS,
    Answer,
    PageData,
    as_json,
    not_found,
    page_answer,
    redirect,
)
from hicache_core.process.main_thread import main_has_ended

log = logging.getLogger(__name__)

DEFAULT_PORT = 9477
REQUEST_TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.1
PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclasses.dataclass(frozen=True)
class StatusPages(PageData):
    """What the server shows: the page and its data, and metrics.

    Attributes:
        metrics: the series as Prometheus text; None if prometheus_client is not installed.
    """

    metrics: Callable[[], bytes] | None = None


class StatusServer:
    """Serves ``/hicache/`` and the data of that page, ``/metrics`` and ``/health``.

    It only reads, and masks everything that looks like a secret. It has no authentication: everyone
    who can reach its address can read, so by default it listens on loopback.
    """

    def __init__(
        self, pages: StatusPages, *, host: str = "127.0.0.1", port: int = DEFAULT_PORT
    ) -> None:
        """Binds nothing yet.

        Args:
            pages: what to show.
            host: the address to listen on.
            port: 0 for any free one.
        """
        self._pages = pages
        self._host = host
        self._port = port
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def bind(self) -> None:
        """Binds the address; clients that connect now wait for ``open``.

        Raises:
            ConfigError: the address is in use, or does not belong to this machine.
        """
        try:
            self._server = _Server((self._host, self._port), self._pages)
        except OSError as error:
            raise ConfigError(
                f"the status server cannot listen on {self._host}:{self._port}: {error}; "
                "choose another port, or 0 for any"
            ) from error

    def open(self) -> None:
        """Starts to answer; calls ``bind`` first, unless that was called before."""
        if self._server is None:
            self.bind()
        assert self._server is not None
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.1},
            name="hicache-status",
        )
        self._thread.start()

    def close(self) -> None:
        """Cuts open connections, ends all threads; may be called twice."""
        server, self._server = self._server, None
        if server is None:
            return
        if self._thread is not None:
            server.shutdown()
            self._thread.join()
        server.cut_connections()
        server.server_close()  # joins the threads of requests

    @property
    def url(self) -> str:
        """URL of the server, once open."""
        assert self._server is not None
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"


class _Server(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], pages: StatusPages) -> None:
        self.pages = pages
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        self._threads_of_requests: list[threading.Thread] = []
        self._is_short = False  # of file descriptors or threads, when it accepted last
        super().__init__(address, _Handler)

    def service_actions(self) -> None:
        # docstring inherited; called between requests, at least each tenth of a second
        if main_has_ended():
            raise SystemExit  # ends this thread

    def get_request(self) -> tuple[socket.socket, object]:
        # docstring inherited
        try:
            connection, address = super().get_request()
        except OSError as error:
            self._stumble(error)
            raise
        self._is_short = False
        with self._connections_lock:
            self._connections.add(connection)
        return connection, address

    def process_request(self, request: object, client_address: object) -> None:
        # docstring inherited; a thread that does not start costs its request alone
        answer = self.process_request_thread
        thread = threading.Thread(target=answer, args=(request, client_address))
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            self.shutdown_request(request)
            self._stumble(error)
            return
        alive = [one for one in self._threads_of_requests if one.is_alive()]
        self._threads_of_requests = [*alive, thread]

    def server_close(self) -> None:
        # docstring inherited
        super().server_close()
        for thread in self._threads_of_requests:
            thread.join()

    def _stumble(self, error: Exception) -> None:
        """Logs once that connections cannot be accepted now, and pauses."""
        if not self._is_short:
            log.warning("the status server cannot answer now; it will try again: %s", error)
        self._is_short = True
        time.sleep(ACCEPT_PAUSE_S)

    def shutdown_request(self, request: object) -> None:
        # docstring inherited
        assert isinstance(request, socket.socket)
        with self._connections_lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        """Ends connections whose clients send nothing."""
        with self._connections_lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the client was quicker
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        # docstring inherited; instead of a traceback on stderr
        if isinstance(sys.exception(), ConnectionError):
            log.debug("%s disconnected before it was answered", client_address)
            return
        log.exception("the status server could not answer %s", client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_TIMEOUT_S
    server_version = "hicache"
    sys_version = ""

    def do_GET(self) -> None:
        """Answers one request."""
        url = urlsplit(self.path)
        answer = _answer(self.server.pages, url.path, url.query)
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if answer.location:
            self.send_header("Location", answer.location)
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        # docstring inherited; requests are not worth a line each
        log.debug(format, *args)


def _answer(pages: StatusPages, path: str, query: str) -> Answer:
    if path == "/health":
        return as_json({"status": "ok"})
    if path == "/metrics":
        return _metrics(pages)
    if path == "/":
        return redirect("hicache/")
    return page_answer(pages, path, query) or not_found(
        "the paths are: /hicache/ /hicache/status /hicache/history /hicache/requests "
        "/hicache/tree /hicache/explain/<request id> /metrics /health"
    )


def _metrics(pages: StatusPages) -> Answer:
    if pages.metrics is None:
        return not_found("metrics need prometheus_client: pip install 'hicache-core[metrics]'")
    return Answer(HTTPStatus.OK, PROMETHEUS_TEXT, pages.metrics())
