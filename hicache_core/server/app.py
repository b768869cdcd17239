"""The application: all routes over one service, behind the door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hicache_core.config.hosts import is_loopback
from hicache_core.errors import HiCacheError
from hicache_core.server import routes_admin, routes_generate, routes_info, routes_page
from hicache_core.server.access import Door
from hicache_core.server.problems import Problem, answer_problem
from hicache_core.server.service import Service

ERRORS = (
    Problem,
    HiCacheError,
    ClientDisconnect,
    HTTPException,
    ValidationError,
    TimeoutError,
    Exception,
)


def make_app(service: Service) -> FastAPI:
    """An ASGI application; when its lifespan ends, ``service`` is closed."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.open()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    for module in (routes_generate, routes_info, routes_admin, routes_page):
        app.include_router(module.make_router(service))
    for error in ERRORS:
        app.add_exception_handler(error, answer_problem)
    settings = service.settings
    app.add_middleware(Door, keys=settings.keys, is_private=is_loopback(settings.host))
    return app
