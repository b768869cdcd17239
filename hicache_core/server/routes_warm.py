"""The route that warms the cache: prefixes of prompts, from storage to the host."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hicache_core.config.redact import masked
from hicache_core.server.bodies import Prompts, Tenant
from hicache_core.server.body_route import BodyRoute
from hicache_core.server.problems import json_answer
from hicache_core.server.prompts import namespace_of
from hicache_core.server.service import Service
from hicache_core.types import Namespace

if TYPE_CHECKING:
    from hicache_core.controller.warming import Warming

CALL_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 120.0
"""How long one call waits for storage; what has arrived by then is in the host."""

_PAUSE_S = 0.005


class WarmBody(Tenant, Prompts):
    """``POST /hicache/warm``."""


def make_router(service: Service) -> APIRouter:
    """The route, over ``service``; the access check lets only the operator in."""
    router = APIRouter(route_class=BodyRoute)
    warmer = Warmer(service)

    @router.post("/hicache/warm")
    async def warm(_http: Request, body: WarmBody) -> Response:
        """Loads what storage has of prompts to the host; answers once it is there."""
        namespace = namespace_of(body.cache_salt, body.extra_key)
        encoded = await service.prompts.of_warm(body.prompts)
        loaded = [warmer.warm(tokens, namespace) for tokens in encoded]
        prompts = await asyncio.gather(*loaded)
        cache = service.engine.cache
        sizes = {"page_size": cache.page_size, "page_nbytes": cache.snapshot().page_nbytes}
        return json_answer({**sizes, "prompts": prompts})

    return router


class Warmer:
    """Has the engine load prompts."""

    def __init__(self, service: Service) -> None:
        """Starts nothing."""
        self._engine = service.engine

    async def warm(self, tokens: tuple[int, ...], namespace: Namespace) -> dict[str, object]:
        """Loads one prompt.

        Args:
            tokens: of the prompt.
            namespace: whose cache it is.

        Returns:
            ``prompt_tokens``, those that device and host have now as ``cached_tokens``, those that
            came from storage as ``loaded_tokens``, and why there are not more.
        """
        name = f"warm-{uuid.uuid4().hex}"
        named = self._engine.namespace(namespace)
        warming: Warming = await self._call("warm", name, tokens, astuple(named))
        try:
            until = time.monotonic() + LOAD_TIMEOUT_S
            while not warming.done and time.monotonic() < until:
                await asyncio.sleep(_PAUSE_S)
        finally:  # also if the client has left: the cache still knows of it
            n_loaded = await asyncio.shield(self._call("finish_prefetch", name))
        n_cached = await asyncio.to_thread(
            self._engine.call,
            lambda cache: cache.match_prefix(tokens, named, touch=False).n_tokens,
            CALL_TIMEOUT_S,
        )
        page_size = self._engine.cache.page_size
        told = {"prompt_tokens": len(tokens), "cached_tokens": n_cached, "loaded_tokens": n_loaded}
        shortfall = warming.shortfall
        if n_cached >= len(tokens) // page_size * page_size:
            return told
        reason, detail = ("absent", "") if shortfall is None else shortfall
        return told | {"reason": reason, "detail": masked(detail)}

    async def _call(self, method: str, *arguments: object) -> Any:
        call_all = self._engine.call_all
        return await asyncio.to_thread(call_all, method, *arguments, timeout_s=CALL_TIMEOUT_S)
