"""The routes of the operator: emptying the cache, changing the storage backend."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from hicache_core.build.backends import CHAIN, DYNAMIC
from hicache_core.config.redact import masked
from hicache_core.config.settings import HiCacheConfig
from hicache_core.config.sources import EXTRA
from hicache_core.server.bodies import AttachBody
from hicache_core.server.body_route import BodyRoute
from hicache_core.server.problems import Problem, json_answer
from hicache_core.server.service import Service

if TYPE_CHECKING:
    from hicache_core.controller.attachment import Attaching, Clearing

CALL_TIMEOUT_S = 10.0
RESET_TIMEOUT_S = 5.0
STORAGE_TIMEOUT_S = 60.0
FlushTimeout = Annotated[float, Query(ge=0, le=600, allow_inf_nan=False)]
POLICIES = ("hicache_storage_prefetch_policy", "hicache_write_policy")
PUT = "PUT /hicache/storage-backend"
DELETE = "DELETE /hicache/storage-backend"
_PAUSE_S = 0.01


def make_router(service: Service) -> APIRouter:
    """The routes, over ``service``; the access check lets only the operator in."""
    router = APIRouter(route_class=BodyRoute)
    storage = StorageAdmin(service)

    @router.get("/flush_cache")
    @router.post("/flush_cache")
    async def flush_cache(timeout: FlushTimeout = 0.0) -> Response:
        """Empties device and host, as soon as nothing is in use; waits ``timeout`` seconds."""
        await storage.flush(timeout)
        return PlainTextResponse("Cache flushed.\n")

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache(
        reset_running_requests: bool = False, reset_external: bool = False
    ) -> Response:
        """vLLM's: empties device and host; waits some seconds until nothing is in use."""
        if reset_running_requests or reset_external:
            raise Problem(
                400,
                "reset_running_requests and reset_external are not supported by this server; to "
                "clear the store, use POST /hicache/storage-backend/clear",
            )
        await storage.flush(RESET_TIMEOUT_S)
        return Response()

    @router.get("/hicache/storage-backend")
    async def show() -> Response:
        """The storage backend, its settings without secrets, and its state."""
        return json_answer(storage.shown())

    @router.put("/hicache/storage-backend")
    async def attach(_http: Request, body: AttachBody) -> Response:
        """Opens a storage backend and uses it in place of the present one."""
        await storage.attach(body)
        return PlainTextResponse("HiCache storage backend attached.\n")

    @router.delete("/hicache/storage-backend")
    async def detach() -> Response:
        """Goes on without storage."""
        await storage.detach()
        return PlainTextResponse("HiCache storage backend detached.\n")

    @router.post("/hicache/storage-backend/clear")
    async def clear() -> Response:
        """Removes what servers of this kind have stored."""
        n = await storage.clear()
        return PlainTextResponse(
            f"Hierarchical cache storage backend cleared: {n} objects of this server's namespace.\n"
        )

    return router


class StorageAdmin:
    """What the operator may do to the tiers while requests run."""

    def __init__(self, service: Service) -> None:
        """Starts with what the server was started with."""
        self._service = service
        config = service.settings.cache.resolve().in_force
        self._config = config

    async def flush(self, timeout_s: float) -> None:
        """Empties device and host as soon as nothing is in use.

        Raises:
            Problem: something was in use all the time.
        """
        until = time.monotonic() + timeout_s
        while not await self._call_all("reset"):
            if time.monotonic() >= until:
                raise Problem(
                    400,
                    "the cache was not flushed: requests, copies or storage jobs are still "
                    "running; try again, or with ?timeout=<seconds>",
                )
            await asyncio.sleep(_PAUSE_S)

    def shown(self) -> dict[str, object]:
        """Name and settings of the backend, secrets masked, and how it is."""
        config = self._config
        snapshot = self._service.engine.cache.snapshot()
        return {
            "hicache_storage_backend": config.hicache_storage_backend,
            EXTRA: masked(config.hicache_storage_backend_extra_config),
            "hicache_storage_prefetch_policy": config.hicache_storage_prefetch_policy,
            "hicache_write_policy": config.hicache_write_policy,
            "backends": [
                {
                    "name": backend.name,
                    "breaker": backend.breaker,
                    "last_error": masked(backend.last_error),
                }
                for backend in snapshot.backends
            ],
        }

    async def attach(self, body: AttachBody) -> None:
        """Opens a backend and takes it in place of the present one.

        Raises:
            ConfigError: a setting is wrong.
            Problem: it cannot be opened, or something was asked that cannot change now.
        """
        wanted = self._wanted(body)
        name = wanted.hicache_storage_backend
        assert name is not None
        settings = wanted.backend_config
        if _names_a_class(name, settings) and self._service.settings.keys.admin is None:
            raise Problem(
                403,
                "loading a class by its name requires the admin key, and this server has none: "
                "start it with --admin-api-key, or with that backend",
            )
        attaching = await self._call_all("attach_storage", name, settings)
        await _ended(attaching, f"backend {name!r} is still being opened; look again later")
        if attaching.error:
            raise Problem(
                400, f"Failed to attach HiCache storage backend: {masked(attaching.error)}"
            )
        keys = wanted.controller_keys.model_dump()
        policies = wanted.model_dump(include=set(POLICIES)) | {EXTRA: keys}
        await self._call_all("set_policies", policies)
        self._config = wanted

    async def detach(self) -> None:
        """Goes on without storage."""
        await self._call_all("detach_storage")
        self._config = self._changed(DELETE, hicache_storage_backend=None, extra={})

    async def clear(self) -> int:
        """Removes from the store what servers of this kind put there; how many objects.

        Raises:
            ConfigError: there is no backend, or it cannot be cleared.
            Problem: the store failed, on whatever rank.
        """
        clearing: Clearing = await self._call_all("clear_storage")
        await _ended(clearing, "the store is still being cleared")
        if clearing.error:
            raise Problem(503, f"the store was not cleared: {masked(clearing.error)}")
        return clearing.n_objects

    def _wanted(self, body: AttachBody) -> HiCacheConfig:
        """The settings that the body leads to.

        Raises:
            ConfigError: a setting is wrong.
            Problem: no backend is named.
        """
        wanted = self._changed(
            PUT,
            hicache_storage_backend=body.hicache_storage_backend,
            extra=body.extra_config,
            **{key: value for key in POLICIES if (value := getattr(body, key)) is not None},
        )
        if wanted.hicache_storage_backend is None:
            raise Problem(
                400, "hicache_storage_backend is none; name a backend, or detach with DELETE"
            )
        return wanted

    def _changed(
        self, source: str, *, hicache_storage_backend: str | None, extra: object, **policies: str
    ) -> HiCacheConfig:
        values = {"hicache_storage_backend": hicache_storage_backend, EXTRA: extra, **policies}
        config = self._config.changed(values, source)
        present = self._config.controller_keys
        kept = {key: getattr(present, key) for key in present.model_fields_set}
        extra_config = kept | config.hicache_storage_backend_extra_config
        return config.model_copy(update={EXTRA: extra_config})

    async def _call_all(self, method: str, *arguments: object) -> Any:
        call_all = self._service.engine.call_all
        return await asyncio.to_thread(call_all, method, *arguments, timeout_s=CALL_TIMEOUT_S)


async def _ended(work: Attaching | Clearing, or_else: str) -> None:
    """Returns when ``work`` is done on all ranks; Problem if that takes too long."""
    until = time.monotonic() + STORAGE_TIMEOUT_S
    while not work.done:
        if time.monotonic() >= until:
            raise Problem(503, or_else)
        await asyncio.sleep(_PAUSE_S)


def _names_a_class(name: str, settings: Mapping[str, object]) -> bool:
    """Whether a backend, or a link of a chain, is a class that the settings name."""
    links = settings.get("links") if name == CHAIN else []
    if not isinstance(links, list):
        return False
    return name == DYNAMIC or any(
        isinstance(link, dict) and link.get("backend") == DYNAMIC for link in links
    )
