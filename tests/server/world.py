"""The smallest server: an echo engine behind the real application, called without a socket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from hicache_core.config.settings import HiCacheConfig
from hicache_core.server.access import Keys
from hicache_core.server.app import make_app
from hicache_core.server.prompts import Limits
from hicache_core.server.service import ServedModel, Service
from hicache_core.server.settings import ServerSettings
from tests.server.echo import CONTEXT, EchoEngine
from tests.unit.engine.tiny_chat_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
PAGE = 4
LOCAL = ("127.0.0.1", 5555)
REMOTE = ("192.0.2.7", 5555)


@dataclass
class Server:
    """A running server.

    Attributes:
        engine: behind it.
        client: calls it from this machine.
        app: the application.
    """

    engine: EchoEngine
    client: httpx.AsyncClient
    app: Any
    service: Service

    def calling_from(self, address: tuple[str, int], **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, client=address)
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers)


@contextlib.asynccontextmanager
async def server(
    *,
    keys: Keys | None = None,
    max_waiting: int = 8,
    max_body_nbytes: int = 1 << 20,
    cache: dict[str, Any] | HiCacheConfig | None = None,
    **settings: Any,
) -> AsyncIterator[Server]:
    """A server on a cache of 4-token pages; closed at the end."""
    is_whole = isinstance(cache, HiCacheConfig)
    config = cache if is_whole else HiCacheConfig(page_size=PAGE, **(cache or {}))
    engine = EchoEngine(config, TOKENIZER, max_waiting=max_waiting)
    served = ServedModel("echo", TOKENIZER, Limits(CONTEXT, VOCAB, max_body_nbytes))
    service = Service(
        ServerSettings("somewhere", config, keys=keys or Keys(), **settings), served, engine
    )
    app = make_app(service)
    transport = httpx.ASGITransport(app, client=LOCAL)
    try:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            yield Server(engine, client, app, service)
    finally:
        engine.close(0.1)
