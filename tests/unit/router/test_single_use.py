"""A request's connection ends with the request, at whatever moment that is."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import httpx

from hicache_core.router.single_use import SingleUse

Session = Callable[[httpx.AsyncClient, str], Awaitable[None]]
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n"


class Listener:
    """Answers half of what it announces, and knows who is connected."""

    def __init__(self) -> None:
        self.n_connected = 0
        self.n_seen = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until the other side ends it."""
        self.n_connected += 1
        self.n_seen += 1
        try:
            if await reader.readline():
                writer.write(ANSWER + b"abc")
            while await reader.read(1000):
                pass
        except ConnectionError:
            pass
        finally:
            self.n_connected -= 1
            writer.close()


async def connected_after(sessions: list[Session]) -> tuple[int, int]:
    """Connections that are left when all ``sessions`` have ended, and how many there were."""
    listener = Listener()
    server = await asyncio.start_server(listener.serve, "127.0.0.1", 0)
    url = "http://{}:{}/".format(*server.sockets[0].getsockname()[:2])
    async with server, httpx.AsyncClient(transport=SingleUse(), trust_env=False) as client:
        for session in sessions:
            await session(client, url)
        for _ in range(200):  # the last ends may be on their way
            if listener.n_connected:
                await asyncio.sleep(0.01)
        return listener.n_connected, listener.n_seen


def cancelled_after(n_steps: int) -> Session:
    """A request whose task is cancelled after so many turns of the event loop."""

    async def session(client: httpx.AsyncClient, url: str) -> None:
        asking = asyncio.ensure_future(client.get(url))
        for _ in range(n_steps):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])

    return session


async def left_half_read(client: httpx.AsyncClient, url: str) -> None:
    """A stream of which one piece is taken."""
    async with client.stream("GET", url) as answer:
        assert await anext(answer.aiter_raw()) == b"abc"


def test_no_connection_is_left_of_requests_that_were_cancelled_at_any_moment() -> None:
    n_left, n_seen = asyncio.run(
        connected_after([cancelled_after(n) for n in range(60) for _ in range(3)])
    )
    assert n_left == 0
    assert n_seen > 60


def test_no_connection_is_left_of_a_stream_that_was_not_read_to_its_end() -> None:
    assert asyncio.run(connected_after([left_half_read] * 5)) == (0, 5)


def test_a_refused_connection_is_an_error_of_the_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    async def ask() -> str:
        async with httpx.AsyncClient(transport=SingleUse(), trust_env=False) as client:
            try:
                await client.get(f"http://127.0.0.1:{port}/")
            except httpx.ConnectError as error:
                return type(error).__name__
        return ""

    assert asyncio.run(ask()) == "ConnectError"
