"""The page's routes for FastAPI: ``/hicache/`` and what it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.params import Depends

from hicache_core.observe.page.answers import HEADERS, PageData, not_found, page_answer, page_file


def page_router(data: PageData, *, dependencies: Sequence[Depends] = ()) -> APIRouter:
    """Routes for a FastAPI app. The page's files are public; its data requires ``dependencies``.

    Add other routes below ``/hicache/`` to the app before this router.

    Args:
        data: what to show; called on FastAPI's threads.
        dependencies: of the routes with data, such as one that checks a key.
    """
    router = APIRouter()

    def answered(request: Request) -> Response:
        return _response(data, request.url.path, request.url.query)

    def opened(name: str = "index.html") -> Response:
        answer = page_file(name) or not_found(f"the page has no file {name!r}")
        return Response(answer.body, answer.status, HEADERS, answer.content_type)

    def redirected() -> Response:
        return _response(data, "/hicache", "")

    settings: dict[str, Any] = {"methods": ["GET"], "include_in_schema": False}
    for path in ("status", "history", "requests", "tree", "engine", "explain/{request_id:path}"):
        router.add_api_route(
            f"/hicache/{path}", answered, dependencies=list(dependencies), **settings
        )
    router.add_api_route("/hicache", redirected, **settings)
    router.add_api_route("/hicache/", opened, **settings)
    router.add_api_route("/hicache/{name}", opened, **settings)
    return router


def _response(data: PageData, path: str, query: str) -> Response:
    answer = page_answer(data, path, query) or not_found(f"nothing at {path} here")
    headers = HEADERS | ({"Location": answer.location} if answer.location else {})
    return Response(answer.body, answer.status, headers, answer.content_type)
