"""Access: who may call what. Keys are compared in constant time and never shown."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hicache_core.config.hosts import is_loopback
from hicache_core.observe.page.answers import page_names
from hicache_core.server.problems import Problem, json_answer

ADMIN = "hicache_is_admin"
HAS_ADMIN_KEY = "hicache_has_admin_key"
_OPEN = frozenset(
    ["/", "/health", "/hicache", "/hicache/", *(f"/hicache/{name}" for name in page_names())]
)
_ADMIN_PATHS = (
    "/flush_cache",
    "/hicache/storage-backend",
    "/hicache/warm",
    "/reset_prefix_cache",
)
_BY_PROXY = ("forwarded", "x-forwarded-for", "x-real-ip")


@dataclass(frozen=True, slots=True)
class Keys:
    """The secrets of a server; None where none is required.

    Attributes:
        api: required of every caller.
        admin: of the operator; also accepted in place of ``api``.
        transfer: shared by prefill and decode nodes.
    """

    api: str | None = field(default=None, repr=False)
    admin: str | None = field(default=None, repr=False)
    transfer: str | None = field(default=None, repr=False)


class AccessMiddleware:
    """ASGI middleware that checks keys.

    Without an admin key, a caller on this machine is the operator: over loopback, not through a
    proxy, and not from a page in a browser.

    A server on loopback without keys refuses requests from pages of other sites. Otherwise any page
    in a browser on this machine could send prompts, or read answers by DNS rebinding.
    """

    def __init__(self, app: ASGIApp, keys: Keys, *, is_private: bool) -> None:
        """Wraps ``app``.

        Args:
            app: gets the requests that are let through.
            keys: to check.
            is_private: True if the server listens on loopback only.
        """
        self._app = app
        self._keys = keys
        self._is_private = is_private

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
        if self._is_private and self._keys.api is None and not _is_of_this_site(headers):
            return Problem(
                403,
                "this server listens on loopback without keys, so it refuses requests from pages "
                "of other sites; start it with --api-key",
            )
        shown = _bearer(headers)
        is_admin = _same(shown, self._keys.admin)
        scope[HAS_ADMIN_KEY] = is_admin
        path = str(scope["path"])
        needs_key = self._keys.api is not None and path not in _OPEN
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
                403, "without --admin-api-key, this call is for clients on this machine only"
            )
        if not shown:
            return Problem(
                401, "this call needs the admin key", headers={"WWW-Authenticate": "Bearer"}
            )
        return Problem(403, "this call needs the admin key; another one was sent")


def check_priority(priority: int, most: int, scope: Scope) -> None:
    """Raises Problem if a client asks for a priority above its limit.

    Args:
        priority: of the request.
        most: maximum for clients without the admin key.
        scope: ASGI scope of the request, after the access check.
    """
    if priority > most and not scope.get(HAS_ADMIN_KEY):
        raise Problem(
            400,
            f"priority {priority}: clients may ask for at most {most} here, since it delays all "
            "others; more needs the admin key, or --max-client-priority",
            param="priority",
        )


def _bearer(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _same(shown: str, key: str | None) -> bool:
    if key is None:
        return False
    return hmac.compare_digest(shown.encode("latin-1", "replace"), key.encode())


def is_operator(scope: Scope, keys: Keys) -> bool:
    """Whether a request comes from the operator, at a server without an API key."""
    headers = Headers(scope=scope)
    if keys.admin is None:
        return _is_local(scope, headers)
    return _same(_bearer(headers), keys.admin)


def _is_local(scope: Scope, headers: Headers) -> bool:
    client = scope.get("client")
    if client is None or not is_loopback(str(client[0])):
        return False
    return not any(name in headers for name in _BY_PROXY) and _is_of_this_site(headers)


def _is_of_this_site(headers: Headers) -> bool:
    """Whether a call comes from no page in a browser, or from one of this very machine."""
    host = headers.get("host")  # browsers always send it
    if host is not None and not is_loopback(_host_of("//" + host)):  # a name that was bent to us
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
