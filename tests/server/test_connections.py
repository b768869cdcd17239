"""Connections that say nothing, drip or do not read end by themselves and keep nobody out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from hicache_core.server.connections import ConnectionLimits, Connections, body_taken, bounded

pytestmark = pytest.mark.anyio

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
PATIENCE_S = 30.0


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body; a path of digits gets that many bytes instead."""
    nbytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        nbytes += len(message["body"])
        if not message["more_body"]:
            break
    body_taken(scope)
    asked = scope["path"].strip("/")
    if asked == "wait":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(int(asked or 0) >> 16):
        await send({"type": "http.response.body", "body": b"x" * (1 << 16), "more_body": True})
    await send({"type": "http.response.body", "body": b"%d" % nbytes})


@contextlib.asynccontextmanager
async def listening(**limits: Any) -> AsyncIterator[tuple[str, int]]:
    """A server of ``app`` with small limits; the address."""
    quick = {"patience_s": 0.3, "window_s": 0.3, "window_nbytes": 1000}
    own = bounded(ConnectionLimits(**{**quick, **limits}))
    config = uvicorn.Config(app, lifespan="off", log_level="critical", access_log=False, **own)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield listener.getsockname()[:2]
        finally:
            server.should_exit = True
            await running


async def says(where: tuple[str, int], *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """All that a server answers to ``pieces``, until it closes."""
    reader, writer = await asyncio.open_connection(*where)
    answer = asyncio.create_task(reader.read())
    try:
        for piece in pieces:
            if not answer.done():
                writer.write(piece)
                await asyncio.sleep(pause_s)
        return await asyncio.wait_for(answer, PATIENCE_S)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def is_served(where: tuple[str, int]) -> bool:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
    return (await says(where, head + b"abc")).endswith(b"\r\n\r\n1\r\n3\r\n0\r\n\r\n")


@pytest.mark.parametrize("said", [b"", b"POST / HTTP/1.1\r\nHost:"])
async def test_a_connection_that_says_no_whole_request_is_closed(said: bytes) -> None:
    async with listening() as where:
        assert await says(where, said) == b""
        assert await is_served(where)


async def test_a_body_that_stalls_is_408_and_one_that_comes_slowly_is_taken() -> None:
    async with listening() as where:
        stalled = says(where, HEAD % 100_000 + b"{")
        dripping = says(where, HEAD % 100_000, *[b"x"] * 100, pause_s=0.02)
        slow = says(where, HEAD % 20_000, *[b"x" * 500] * 40, pause_s=0.02)
        refused, dripped, taken = await asyncio.gather(stalled, dripping, slow)
        assert await is_served(where)
    assert refused.startswith(b"HTTP/1.1 408 ")
    error = json.loads(refused.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"] == "the request did not arrive in time"
    assert b" 200 " not in dripped
    assert b"20000" in taken


async def test_an_answer_that_its_client_does_not_read_ends() -> None:
    async with listening() as where:
        reader, writer = await asyncio.open_connection(*where, limit=1024)
        writer.write(b"GET /50000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(1.5)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(50_000_000), PATIENCE_S)
        writer.close()


async def test_a_new_connection_closes_the_oldest_that_only_waits() -> None:
    async with listening(n_connections=4, patience_s=60, window_s=60) as where:
        working = asyncio.create_task(says(where, b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"))
        await asyncio.sleep(0.05)
        sending = asyncio.create_task(says(where, HEAD % 100_000 + b"{"))
        await asyncio.sleep(0.05)
        idle = [asyncio.create_task(says(where)) for _ in range(8)]
        await asyncio.wait_for(asyncio.gather(*idle[:6]), PATIENCE_S)
        assert await is_served(where)
        assert not working.done()
        assert not sending.done()
        for task in (working, sending, *idle):
            task.cancel()
        await asyncio.gather(working, sending, *idle, return_exceptions=True)


async def test_where_all_connections_work_a_new_one_is_503() -> None:
    async with listening(n_connections=2, patience_s=60) as where:
        wait = b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"
        working = [asyncio.create_task(says(where, wait)) for _ in range(2)]
        await asyncio.sleep(0.2)
        assert (await says(where, b"")).startswith(b"HTTP/1.1 503 ")
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)


async def test_bodies_together_are_bounded_and_the_oldest_that_has_not_arrived_goes() -> None:
    async with listening(body_nbytes=3_000_000, window_s=60) as where:
        part = HEAD % 2_000_000 + b"x" * 1_900_000
        first = asyncio.create_task(says(where, part))
        await asyncio.sleep(0.3)
        second = asyncio.create_task(says(where, part))
        assert (await first).startswith(b"HTTP/1.1 503 ")
        assert await is_served(where)
        assert not second.done()
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)


async def test_a_body_that_was_read_no_longer_counts() -> None:
    async with listening(body_nbytes=3_000_000, window_s=60) as where:
        head = b"POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n"
        working = []
        for _ in range(4):
            working.append(asyncio.create_task(says(where, head + b"x" * 2_000_000)))
            await asyncio.sleep(0.2)
        assert await is_served(where)
        is_refused = [task.done() for task in working]
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
    assert not any(is_refused)


def test_a_want_of_files_is_said_once_and_not_a_thousand_times(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = asyncio.new_event_loop()
    connections = Connections(ConnectionLimits())
    with caplog.at_level(logging.ERROR):
        for _ in range(1000):
            connections._on_loop_error(
                loop, {"message": "", "exception": OSError(24, "too many files")}
            )
    loop.close()
    assert len(caplog.records) == 1
    assert "new connections must wait" in caplog.text
