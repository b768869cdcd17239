"""The application: all routes of one service, behind the access check."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hicache_core.config.hosts import is_loopback
from hicache_core.errors import HiCacheError
from hicache_core.server import (
    routes_admin,
    routes_generate,
    routes_info,
    routes_page,
    routes_tokens,
    routes_warm,
)
from hicache_core.server.access import AccessMiddleware
from hicache_core.server.problems import ErrorAnswer, Problem, answer_problem, invalid
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

    app = FastAPI(
        title="HiCache",
        version=version("hicache-core"),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from another host; routes_info has one
        redoc_url=None,
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
    )
    app.state.limits = service.served.limits
    for module in (
        routes_generate,
        routes_tokens,
        routes_info,
        routes_admin,
        routes_warm,
        routes_page,
    ):
        app.include_router(module.make_router(service))
    for error in ERRORS:
        app.add_exception_handler(error, answer_problem)
    app.add_exception_handler(RequestValidationError, _answer_query)
    settings = service.settings
    app.add_middleware(AccessMiddleware, keys=settings.keys, is_private=is_loopback(settings.host))
    return app


def _answer_query(request: Request, error: Exception) -> Response:
    """A query that does not validate. Each place begins with where FastAPI looked for it."""
    assert isinstance(error, RequestValidationError)
    details = [{**found, "loc": found["loc"][1:]} for found in error.errors()]
    return answer_problem(request, invalid(details))  # type: ignore[arg-type]
