"""Connections: limits on their number, their silence and the bytes that they send."""

from __future__ import annotations

import asyncio
import enum
import errno
import json
import logging
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hicache_core.server.problems import Problem

log = logging.getLogger(__name__)

BODY_TAKEN = "hicache.body_taken"
"""Key in a request's scope: a function to call when its body is no longer in memory."""

MAX_CONNECTIONS = 4096

_BACKLOG = 128
_MAX_FILES = 1 << 16
_SWEEPS_A_WINDOW = 10
_SAY_AGAIN_S = 10.0
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TOO_SLOW = Problem(408, "the request did not arrive in time")
_TOO_MUCH = Problem(503, "too many bytes of request bodies are arriving; try again later")
_TOO_MANY = Problem(503, "too many connections are busy; try again later")


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits on a server's connections and on the memory of request bodies.

    Attributes:
        n_connections: maximum number at once; beyond it, idle ones are closed, the oldest first.
        patience_s: for the headers of a request, and for a client that does not read its answer.
        window_s: an arriving body must bring ``window_nbytes`` in each window of this length.
        window_nbytes: see ``window_s``.
        body_nbytes: maximum bytes of all bodies that routes have not read yet; beyond it, the
            oldest one that is still arriving is refused.
    """

    n_connections: int = MAX_CONNECTIONS
    patience_s: float = 20.0
    window_s: float = 10.0
    window_nbytes: int = 64 << 10
    body_nbytes: int = 256 << 20


def bounded(limits: ConnectionLimits | None = None) -> dict[str, Any]:
    """Arguments of ``uvicorn.Config`` and ``uvicorn.run`` that limit a server's connections.

    Without ``limits`` the defaults apply, and connections may use half of the file descriptors of
    this process; their number is raised as far as the system allows.
    """
    if limits is None:
        limits = ConnectionLimits(n_connections=_usual_connections())
    return {"http": partial(Connection, Connections(limits)), "ws": "none", "backlog": _BACKLOG}


def _usual_connections() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(16, min(MAX_CONNECTIONS, wanted // 2))


class _Phase(enum.Enum):
    """What a connection does now."""

    WAITING = enum.auto()  # for a request to begin, or for the rest of its headers
    RECEIVING = enum.auto()  # a body
    LEFTOVER = enum.auto()  # a body whose answer has been given
    ANSWERING = enum.auto()
    STUCK = enum.auto()  # the client does not read
    CLOSING = enum.auto()


_KEPT = (_Phase.ANSWERING, _Phase.CLOSING)
_CLOSED_FIRST = {_Phase.WAITING: 0, _Phase.LEFTOVER: 1, _Phase.STUCK: 2, _Phase.RECEIVING: 3}


class Connections:
    """All connections of one server. Event loop only; the first connection starts it."""

    def __init__(self, limits: ConnectionLimits) -> None:
        """No connections yet."""
        self.limits = limits
        self._inside: set[Connection] = set()
        self._body_nbytes = 0
        self._is_sweeping = False
        self._said_s = float("-inf")

    def enter(self, one: Connection) -> None:
        """Adds a connection; if there are too many, an idle one is closed for it."""
        self._inside.add(one)
        if not self._is_sweeping:
            self._is_sweeping = True
            one.loop.set_exception_handler(self._on_loop_error)
            self._sweep(one.loop)
        if len(self._inside) > self.limits.n_connections and not self._close_one(but=one):
            one.refuse(_TOO_MANY)

    def leave(self, one: Connection) -> None:
        """Forgets a connection."""
        self._inside.discard(one)

    def hold(self, nbytes: int) -> None:
        """Adds ``nbytes`` of bodies to the count; negative when they are released."""
        self._body_nbytes += nbytes
        while self._body_nbytes > self.limits.body_nbytes:
            arriving = [one for one in self._inside if one.phase() is _Phase.RECEIVING]
            if not arriving:
                return
            min(arriving, key=lambda one: one.began_s).refuse(_TOO_MUCH)

    def _close_one(self, but: Connection) -> bool:
        """Closes what is missed least of all; whether there was anything."""
        found = [one for one in self._inside if one is not but and one.phase() not in _KEPT]
        if not found:
            return False
        least = min(found, key=lambda one: (_CLOSED_FIRST[one.phase()], one.began_s))
        least.end()
        self._inside.discard(least)
        return True

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends all that is overdue, again and again."""
        now_s = loop.time()
        for one in list(self._inside):
            one.look(now_s, self.limits)
        self._is_sweeping = bool(self._inside)
        if self._inside:
            loop.call_later(self.limits.window_s / _SWEEPS_A_WINDOW, self._sweep, loop)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """One line instead of thousands where no connection can be accepted for want of files."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _NO_ROOM):
            loop.default_exception_handler(context)
            return
        if loop.time() - self._said_s >= _SAY_AGAIN_S:
            self._said_s = loop.time()
            log.error("new connections must wait: %s (%d are open)", error, len(self._inside))


class Connection(H11Protocol):
    """Uvicorn's connection with time limits.

    Attributes:
        began_s: when it was made, or its last request began; the loop's time.
    """

    def __init__(self, connections: Connections, **given: Any) -> None:
        """``given``: what uvicorn gives its protocols."""
        super().__init__(**given)
        self.began_s = self.loop.time()
        self._connections = connections
        self._held_nbytes = 0
        self._is_stuck = False
        self._seen: tuple[_Phase, object] | None = None
        self._since_s = self.began_s
        self._nbytes = 0
        inner = self.app

        async def app(scope: Any, receive: Any, send: Any) -> None:
            scope.setdefault("extensions", {})[BODY_TAKEN] = self._let_go
            await inner(scope, receive, send)

        self.app = app

    def phase(self) -> _Phase:
        """What it does now."""
        if self.transport.is_closing():
            return _Phase.CLOSING
        if self._is_stuck:
            return _Phase.STUCK
        if self.conn.their_state is h11.IDLE:
            return _Phase.WAITING
        if self.conn.their_state is not h11.SEND_BODY:
            return _Phase.ANSWERING
        return _Phase.LEFTOVER if self.cycle.response_complete else _Phase.RECEIVING

    def look(self, now_s: float, limits: ConnectionLimits) -> None:
        """Ends it if it is overdue."""
        seen = (self.phase(), self.cycle)
        if seen != self._seen:
            self._seen, self._since_s, self._nbytes = seen, now_s, 0
            return
        passed_s, phase = now_s - self._since_s, seen[0]
        if phase is _Phase.RECEIVING and passed_s >= limits.window_s:
            if self._nbytes < limits.window_nbytes and not self.flow.read_paused:
                self.refuse(_TOO_SLOW)
            self._since_s, self._nbytes = now_s, 0
        elif phase not in (_Phase.RECEIVING, _Phase.ANSWERING) and passed_s >= limits.patience_s:
            self.end()

    def end(self) -> None:
        """Closes it, whatever it does; what was not sent is lost."""
        self._leave_app()
        self.transport.abort()

    def refuse(self, problem: Problem) -> None:
        """Answers with a problem, if nothing was answered yet, and closes."""
        self._leave_app()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in _answer(problem):
                if piece := self.conn.send(event):
                    self.transport.write(piece)
        self.transport.close()
        self._let_go()

    def _leave_app(self) -> None:
        """Lets the application see that there is nobody to answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _let_go(self) -> None:
        held, self._held_nbytes = self._held_nbytes, 0
        self._connections.hold(-held)

    # What uvicorn and asyncio call.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # docstring inherited
        super().connection_made(transport)
        self._connections.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        # docstring inherited
        super().connection_lost(exc)
        self._let_go()
        self._connections.leave(self)

    def data_received(self, data: bytes) -> None:
        # docstring inherited
        if self.phase() is _Phase.WAITING:
            self.began_s = self.loop.time()
        self._nbytes += len(data)
        super().data_received(data)
        if self.phase() in (_Phase.RECEIVING, _Phase.ANSWERING):
            self._held_nbytes += len(data)
            self._connections.hold(len(data))

    def on_response_complete(self) -> None:
        # docstring inherited
        self._let_go()
        super().on_response_complete()

    def pause_writing(self) -> None:
        # docstring inherited
        self._is_stuck = True
        super().pause_writing()

    def resume_writing(self) -> None:
        # docstring inherited
        self._is_stuck = False
        self._seen = None
        super().resume_writing()


def _answer(problem: Problem) -> Iterator[h11.Event]:
    body = json.dumps(problem.as_dict()).encode()
    headers = [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    yield h11.Response(status_code=problem.status, headers=headers)
    yield h11.Data(data=body)
    yield h11.EndOfMessage()


def body_taken(scope: Any) -> None:
    """Reports that a request's body was read and released; does nothing under another server."""
    let_go: Callable[[], None] | None = (scope.get("extensions") or {}).get(BODY_TAKEN)
    if let_go is not None:
        let_go()
