"""Problem: an error answer to a client, in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hicache_core.config.redact import masked_text
from hicache_core.errors import HiCacheError, QueueFull, RankLost, UseAfterClose

RETRY_AFTER_S = 1
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_MAX_CLAUSES = 3

# What pydantic finds, in words that name none of its types.
_WORDS = {
    "missing": "this field is required",
    "extra_forbidden": "there is no such field",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "string_unicode": "must be text",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "too_long": "at most {max_length} entries are allowed, got {actual_length}",
    "string_too_long": "at most {max_length} characters are allowed",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
}
_INSTEAD = {
    "/v1/embeddings": "it serves a model that generates text, not embeddings",
    "/v1/messages": "use POST /v1/chat/completions",
    "/v1/responses": "use POST /v1/chat/completions",
}
_OWN_TAG = "~"
PARAM = "param"
"""In the context of an error of a validator: the field that it is about."""


class Problem(Exception):
    """An error answer; ``status`` and message go to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Keeps its arguments.

        Args:
            status: of the HTTP answer.
            message: for the client.
            param: the field that is wrong; None if it is not a field.
            headers: of the HTTP answer.
        """
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = headers

    def as_dict(self) -> dict[str, object]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.status,
            }
        }


class ErrorDetail(BaseModel):
    """What is wrong with a request, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    """The body of every error answer."""

    error: ErrorDetail


def json_answer(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON response in ASCII, so that any text in it can be encoded.

    Args:
        value: the body; what JSON does not know is written as text.
        status: of the HTTP answer.
        headers: further headers.
    """
    return Response(json.dumps(value, default=str), status, headers, "application/json")


def problem_of(error: Exception) -> Problem:
    """The error answer for an exception of HiCache, Starlette or pydantic."""
    match error:
        case Problem():
            problem = error
        case ValidationError():
            problem = invalid(error.errors(include_url=False, include_input=False))
        case ClientDisconnect():
            problem = Problem(499, "the client has left")
        case HTTPException():
            problem = Problem(error.status_code, str(error.detail), headers=error.headers)
        case QueueFull():
            problem = Problem(503, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})
        case UseAfterClose() | RankLost():
            problem = Problem(
                503, "the engine accepts no more requests: it is shutting down, or has failed"
            )
        case HiCacheError():
            problem = Problem(400, masked_text(str(error)))
        case TimeoutError():
            problem = Problem(503, "the engine did not answer in time; it is busy or stuck")
        case _:
            problem = Problem(500, "internal error; see the log of the server")
    return problem


def answer_problem(request: Request, error: Exception) -> Response:
    """FastAPI's handler of every exception."""
    is_unknown = isinstance(error, HTTPException) and error.status_code == 404
    problem = _no_such_call(request) if is_unknown else problem_of(error)
    return json_answer(problem.as_dict(), problem.status, problem.headers)


def _no_such_call(request: Request) -> Problem:
    path = request.url.path
    instead = _INSTEAD.get(path, "GET /docs lists those that there are")
    return Problem(404, f"this server has no call {request.method} {path}; {instead}")


def invalid(details: Sequence[ErrorDetails]) -> Problem:
    """A body or query that does not validate: the first clauses, without what was sent."""
    clauses = []
    for detail in details[:_MAX_CLAUSES]:
        where = ".".join(_path(detail))
        message = _in_words(detail)
        clauses.append(f"{where}: {message}" if where else message)
    first = next(iter(_path(details[0])), details[0].get("ctx", {}).get(PARAM))
    return Problem(400, "; ".join(clauses), param=first)


def _path(detail: ErrorDetails) -> list[str]:
    """Where it is, without the marks by which bodies tell the forms of a value apart."""
    return [str(part) for part in detail["loc"] if not str(part).startswith(_OWN_TAG)]


def _in_words(detail: ErrorDetails) -> str:
    words = _WORDS.get(detail["type"])
    if words is None:
        return detail["msg"].removeprefix("Value error, ")
    return words.format(**detail.get("ctx", {}))
