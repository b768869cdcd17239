"""SingleUse: an HTTP transport whose requests have a connection each, which ends with them."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable

import httpx


class SingleUse(httpx.AsyncBaseTransport):
    """Shares no connection between requests, so that none can leak in a pool.

    If a request is cancelled between connecting and sending, a pool keeps its connection for good.
    Here the connection is closed when the request fails or is cancelled, or its answer is closed.
    """

    def __init__(self, make: Callable[[], httpx.AsyncBaseTransport] | None = None) -> None:
        """``make`` gives the transport of one request; None for the network's."""
        context = ssl.create_default_context() if make is None else None
        self._make = make or (lambda: httpx.AsyncHTTPTransport(verify=context or True))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        # docstring inherited
        transport = self._make()
        try:
            response = await transport.handle_async_request(request)
        except BaseException:  # cancelling included
            await transport.aclose()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=_Answer(response.stream, transport),
            extensions=response.extensions,
        )


class _Answer(httpx.AsyncByteStream):
    """The body of an answer; closing it ends the connection."""

    def __init__(self, body: httpx.AsyncByteStream, transport: httpx.AsyncBaseTransport) -> None:
        self._body = body
        self._transport = transport

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._body:
            yield piece

    async def aclose(self) -> None:
        try:
            await self._body.aclose()
        finally:
            await self._transport.aclose()
