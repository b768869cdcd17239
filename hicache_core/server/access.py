"""The door: who may call what. Keys are compared in constant time and never shown."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hicache_core.hosts import is_loopback
from hicache_core.server.problems import Problem, json_answer

ADMIN = "hicache_is_admin"
_OPEN = frozenset(["/health", "/hicache", "/hicache/"])
_PAGE_FILES = (".html", ".js", ".css", ".svg")
_ADMIN_PATHS = ("/flush_cache", "/hicache/storage-backend")
_BY_PROXY = ("forwarded", "x-forwarded-for", "x-real-ip")


@dataclass(frozen=True, slots=True)
class Keys:
    """What callers must know; None where nothing is asked.

    Attributes:
        api: of everybody.
        admin: of the operator; opens the rest as well.
        transfer: of the other half, where prefill and decode are apart.
    """

    api: str | None = field(default=None, repr=False)
    admin: str | None = field(default=None, repr=False)
    transfer: str | None = field(default=None, repr=False)


class Door:
    """ASGI middleware that checks keys.

    Without an admin key, the operator is who calls from this very machine: over loopback, not
    through a proxy, and not from a page in a browser.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        """Stands before ``app``."""
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, saying in its scope whether it is the operator's."""
        if scope["type"] == "http":
            problem = self._check(scope)
            if problem is not None:
                answer = json_answer(problem.as_dict(), problem.status, problem.headers)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> Problem | None:
        headers = Headers(scope=scope)
        shown = _bearer(headers)
        is_admin = _same(shown, self._keys.admin)
        path = str(scope["path"])
        needs_key = self._keys.api is not None and not _is_open(path)
        if needs_key and not is_admin and not _same(shown, self._keys.api):
            return Problem(
                401,
                "no valid key: send the header Authorization: Bearer <key>",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._keys.admin is None:
            is_admin = _is_local(scope, headers)
        scope[ADMIN] = is_admin
        if is_admin or not path.startswith(_ADMIN_PATHS):
            return None
        if self._keys.admin is None:
            return Problem(
                403, "without --admin-api-key, this call is for clients on this very machine"
            )
        if not shown:
            return Problem(
                401, "this call needs the admin key", headers={"WWW-Authenticate": "Bearer"}
            )
        return Problem(403, "this call needs the admin key; another one was sent")


def _is_open(path: str) -> bool:
    """Whether anybody may have what stands there: the page's own files tell nothing."""
    return path in _OPEN or (path.startswith("/hicache/") and path.endswith(_PAGE_FILES))


def _bearer(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _same(shown: str, key: str | None) -> bool:
    if key is None:
        return False
    return hmac.compare_digest(shown.encode("latin-1", "replace"), key.encode())


def is_operator(scope: Scope, keys: Keys) -> bool:
    """Whether a request is the operator's, at a server that asks for no other key."""
    headers = Headers(scope=scope)
    if keys.admin is None:
        return _is_local(scope, headers)
    return _same(_bearer(headers), keys.admin)


def _is_local(scope: Scope, headers: Headers) -> bool:
    client = scope.get("client")
    if client is None or not is_loopback(str(client[0])):
        return False
    if any(name in headers for name in _BY_PROXY):
        return False
    if not is_loopback(_host_of("//" + headers.get("host", ""))):  # a name that was bent to us
        return False
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or is_loopback(_host_of(origin))


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
