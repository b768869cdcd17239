"""The page at ``/hicache/``: its files are open to all, what it shows is the operator's.

``/`` leads there.
"""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from hicache_core.observe.on_demand import Aged
from hicache_core.observe.page.answers import PageData
from hicache_core.radix.picture import TreePicture
from hicache_core.server.access import ADMIN
from hicache_core.server.page_routes import page_router
from hicache_core.server.problems import Problem
from hicache_core.server.service import Service

PATIENCE_S = 5.0


def make_router(service: Service) -> APIRouter:
    """The routes, over ``service``; to be added last, since others lie below ``/hicache/`` too."""
    engine = service.engine

    def tree() -> Aged[TreePicture]:
        return Aged(engine.call(lambda cache: cache.picture(), PATIENCE_S), 0.0)

    data = PageData(
        service.watch,
        service.history,
        requests=service.recent,
        tree=tree,
        engine=lambda: {"model": service.served.name, **asdict(engine.status())},
    )
    router = page_router(data, dependencies=[Depends(_operator)])

    @router.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("hicache/")  # relative: a proxy may have put a path before it

    return router


def _operator(request: Request) -> None:
    if not request.scope[ADMIN]:
        raise Problem(403, "the data of the page is for the operator: send the admin key")
