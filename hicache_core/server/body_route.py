"""BodyRoute: a route whose endpoint gets the body of its request, checked."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, get_type_hints

from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from hicache_core.server.connections import body_taken
from hicache_core.server.forms import LONGEST
from hicache_core.server.problems import Problem
from hicache_core.server.prompts import Limits

B = TypeVar("B", bound=BaseModel)

BODY = "body"
"""The argument of an endpoint that is the body of the request."""


class BodyRoute(APIRoute):
    """A route whose endpoint may be ``async def endpoint(http: Request, body: SomeModel)``.

    FastAPI describes the body at ``/openapi.json``. It is read here, since FastAPI itself would
    keep the bytes until the answer has ended, check each token of a prompt that is too long, and
    want a content type that not every client sends. The limits are ``app.state.limits``.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        # docstring inherited
        endpoint = self.endpoint
        body_class = get_type_hints(endpoint).get(BODY)
        if body_class is None:
            return super().get_route_handler()

        async def handle(http: Request) -> Response:
            body = await read_body(http, body_class, http.app.state.limits)
            answer: Response = await endpoint(http, body)
            return answer

        return handle


async def read_body(request: Request, body_class: type[B], limits: Limits) -> B:
    """The body of a request.

    Args:
        request: whose body has not been read.
        body_class: what it should be.
        limits: of its size, and of the length of a prompt.

    Raises:
        Problem: 413 if the body is too large, 400 if it is not JSON or not UTF-8.
        ValidationError: it does not match ``body_class``.
    """
    max_nbytes = limits.max_body_nbytes
    too_large = Problem(413, f"the body is larger than {max_nbytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_nbytes:
        raise too_large
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > max_nbytes:
            raise too_large
    try:
        # Two steps: a long list is refused by its length, not by what is wrong with each item.
        value = from_json(raw)
    except ValueError as error:
        raise Problem(400, f"the body is not valid JSON: {error}") from None
    finally:
        del raw
        body_taken(request.scope)
    return body_class.model_validate(value, context={LONGEST: limits.context_length})
