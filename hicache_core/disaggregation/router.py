"""The router: one OpenAI-compatible address before prefill and decode nodes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from hicache_core.disaggregation.nodes import DECODE, Nodes
from hicache_core.disaggregation.relay import Answer, Asked, Relay

PATHS = ("/v1/chat/completions", "/v1/completions", "/generate")
MAX_BODY_NBYTES = 64 << 20


def make_app(
    prefill: Sequence[str],
    decode: Sequence[str],
    *,
    api_key: str = "",
    by_prefix: bool = True,
    interval_s: float = 1.0,
    transport: httpx.AsyncBaseTransport | None = None,
) -> FastAPI:
    """An ASGI application.

    Args:
        prefill: URLs of prefill nodes; may be empty, then decode nodes compute prompts too.
        decode: URLs of decode nodes, at least one.
        api_key: what nodes want of health checks, if anything; requests bring their own.
        by_prefix: whether a prompt goes where most of it was computed before.
        interval_s: between two health checks.
        transport: instead of the network, for tests.
    """
    client = httpx.AsyncClient(
        transport=transport,
        timeout=httpx.Timeout(None, connect=5.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        trust_env=False,
    )
    nodes = Nodes(
        client, prefill, decode, api_key=api_key, by_prefix=by_prefix, interval_s=interval_s
    )
    relay = Relay(client, nodes)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await nodes.check_all()
        watching = asyncio.create_task(nodes.watch())
        try:
            yield
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            await client.aclose()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    for path in PATHS:
        app.add_api_route(path, _route(relay, path), methods=["POST"], response_model=None)
    _add_looks(app, client, nodes, relay)
    return app


def _route(relay: Relay, path: str) -> Callable[[Request], Awaitable[Response]]:
    async def route(http: Request) -> Response:
        raw = await http.body()
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        if not isinstance(body, dict) or len(raw) > MAX_BODY_NBYTES:
            return _plain(Answer.problem(400, "the body must be a JSON object, at most 64 MiB"))
        answer = await _while_connected(http, relay.ask(Asked.of(path, body, dict(http.headers))))
        if answer is None:
            return Response(status_code=499)
        if answer.rest is None:
            await answer.stack.aclose()
            return _plain(answer)
        return StreamingResponse(_pieces(answer), answer.status, answer.headers)

    return route


async def _while_connected(http: Request, work: Awaitable[Answer]) -> Answer | None:
    """The answer; None, and the work is given up, if the client leaves before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(http))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            late = await working
            await late.stack.aclose()
        return None
    finally:
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _pieces(answer: Answer) -> AsyncIterator[bytes]:
    """Everything, then what was held for it is released; also when the client leaves."""
    async with answer.stack:
        yield answer.first
        assert answer.rest is not None
        async for piece in answer.rest:
            yield piece


def _plain(answer: Answer) -> Response:
    return Response(answer.first, answer.status, answer.headers)


def _add_looks(app: FastAPI, client: httpx.AsyncClient, nodes: Nodes, relay: Relay) -> None:
    @app.get("/health")
    async def health() -> Response:
        up = any(node.is_up for node in nodes.all if node.role == DECODE)
        return JSONResponse({"status": "ok" if up else "no decode node is up"}, 200 if up else 503)

    @app.get("/router/status")
    async def status() -> dict[str, Any]:
        return {
            "nodes": nodes.status(),
            "retried": relay.retried,
            "without_prefill": relay.without_prefill,
        }

    @app.get("/v1/models")
    async def models(http: Request) -> Response:
        node = nodes.pick(DECODE, "", "")
        if node is None:
            return _plain(Answer.problem(503, "no decode node is up"))
        asked = Asked.of("/v1/models", {}, dict(http.headers))
        try:
            answer = await client.get(f"{node.url}/v1/models", headers=dict(asked.headers))
        except httpx.HTTPError as error:
            nodes.failed(node, str(error))
            return _plain(Answer.problem(503, f"decode node {node.url} does not answer"))
        return Response(answer.content, answer.status_code, media_type="application/json")
