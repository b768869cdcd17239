"""The router: one OpenAI-compatible address in front of prefill and decode nodes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from hicache_core.router.client_request import ClientRequest, passed_on
from hicache_core.router.forwarder import Answer, Forwarder
from hicache_core.router.nodes import DECODE, Nodes, RouterSettings
from hicache_core.router.single_use import SingleUse

Endpoint = Callable[[Request], Awaitable[Response]]

PATHS = ("/v1/chat/completions", "/v1/completions", "/generate")
MAX_BODY_NBYTES = 32 << 20
"""The limit of the nodes too."""


def nobody(_scope: Scope) -> bool:
    """No client is the operator."""
    return False


def make_app(
    settings: RouterSettings,
    *,
    is_operator: Callable[[Scope], bool] = nobody,
    transport: httpx.AsyncBaseTransport | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Starlette:
    """The router as an ASGI application. It does not check bodies; the nodes do.

    Args:
        settings: the nodes and how to use them.
        is_operator: whether a client, given its ASGI scope, may see the nodes' addresses.
        transport: replaces the network in tests.
        clock: seconds, monotonic.
    """
    client = httpx.AsyncClient(
        transport=transport or SingleUse(),
        timeout=httpx.Timeout(None, connect=5.0),
        trust_env=False,
    )
    nodes = Nodes(client, settings, clock)
    forwarder = Forwarder(client, nodes, settings.secret)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await nodes.check_all()
        watching = asyncio.create_task(nodes.watch())
        try:
            yield
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            await client.aclose()

    routes = [
        *(Route(path, _route(forwarder, path, is_operator), methods=["POST"]) for path in PATHS),
        Route("/health", _health(nodes), methods=["GET"]),
        Route("/router/status", _status(nodes, forwarder, is_operator), methods=["GET"]),
        Route("/v1/models", _models(client, nodes), methods=["GET"]),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _nothing_here, Exception: _broken},
    )


def _route(forwarder: Forwarder, path: str, is_operator: Callable[[Scope], bool]) -> Endpoint:
    async def route(http: Request) -> Response:
        try:
            raw = await _body(http)
            if raw is None:
                return _problem(413, f"the body is larger than {MAX_BODY_NBYTES} bytes")
            asked = ClientRequest.of(path, raw, dict(http.headers))
        except ClientDisconnect:
            return Response(status_code=499)
        except ValueError as error:
            return _problem(400, f"the body must be a JSON object: {str(error)[:200]}")
        answer = await _while_connected(http, forwarder.ask(asked))
        if answer is None:
            return Response(status_code=499)
        if is_operator(http.scope):
            answer.headers |= answer.served_by
        if answer.rest is None:
            await answer.stack.aclose()
            return _plain(answer)
        return StreamedAnswer(answer)

    return route


async def _body(http: Request) -> bytes | None:
    """The body; None as soon as it is too large.

    Raises:
        ClientDisconnect: the client has left.
    """
    announced = http.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > MAX_BODY_NBYTES:
        return None
    raw = bytearray()
    async for piece in http.stream():
        raw += piece
        if len(raw) > MAX_BODY_NBYTES:
            return None
    return bytes(raw)


async def _while_connected(http: Request, work: Awaitable[Answer]) -> Answer | None:
    """The answer; None, and the work is given up, if the client leaves before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(http))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return None
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
        if not working.done():
            with contextlib.suppress(asyncio.CancelledError):
                late = await working
                await late.stack.aclose()


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class StreamedAnswer(StreamingResponse):
    """An answer in pieces; its resources are released at its end, or when the client leaves."""

    def __init__(self, answer: Answer) -> None:
        """Of an answer with a ``rest``."""
        super().__init__(_pieces(answer), answer.status, answer.headers)
        self._stack = answer.stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        # Not in the pieces: nobody may ever ask for the first one.
        async with self._stack:
            await super().__call__(scope, receive, send)


async def _pieces(answer: Answer) -> AsyncIterator[bytes]:
    yield answer.first
    assert answer.rest is not None
    async for piece in answer.rest:
        yield piece


def _plain(answer: Answer) -> Response:
    return Response(answer.first, answer.status, answer.headers)


def _problem(status: int, message: str) -> Response:
    return _plain(Answer.problem(status, message))


def _nothing_here(_http: Request, error: Exception) -> Response:
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


def _broken(_http: Request, _error: Exception) -> Response:
    """An unexpected error; uvicorn logs it."""
    return _problem(500, "an error of the router; its log says more")


def _health(nodes: Nodes) -> Endpoint:
    async def health(_http: Request) -> Response:
        up = any(node.is_up for node in nodes.all if node.role == DECODE)
        return JSONResponse({"status": "ok" if up else "no decode node is up"}, 200 if up else 503)

    return health


def _status(nodes: Nodes, forwarder: Forwarder, is_operator: Callable[[Scope], bool]) -> Endpoint:
    async def status(http: Request) -> Response:
        if not is_operator(http.scope):
            return _problem(
                403, "this is for the admin key; without one, for clients on this very machine"
            )
        told = {"retried": forwarder.retried, "without_prefill": forwarder.without_prefill}
        return JSONResponse({"nodes": nodes.status(), **told})

    return status


def _models(client: httpx.AsyncClient, nodes: Nodes) -> Endpoint:
    async def models(http: Request) -> Response:
        node = nodes.pick(DECODE, "", "")
        if node is None:
            return _problem(503, "no decode node is up")
        headers = passed_on(http.headers)
        try:
            async with node.awaited():
                answer = await client.get(f"{node.url}/v1/models", headers=headers)
        except (httpx.HTTPError, TimeoutError) as error:
            nodes.failed(node, f"{type(error).__name__} {error}".strip())
            return _problem(503, f"{node.name} does not answer")
        return Response(answer.content, answer.status_code, media_type="application/json")

    return models
