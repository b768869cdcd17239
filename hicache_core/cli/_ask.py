"""Requests to the status server of a running cache, answered with JSON."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import click
from pydantic import TypeAdapter, ValidationError

from hicache_core.config.redact import masked_text
from hicache_core.errors import ConfigError
from hicache_core.observe.windows import Observation

DEFAULT_URLS = ("http://127.0.0.1:30000", "http://127.0.0.1:9477")
"""The default addresses of ``hicache serve`` and of a status server."""
F = TypeVar("F", bound=Callable[..., object])
_TIMEOUT_S = 10.0
_CHANGE_TIMEOUT_S = 90.0
"""A server takes up to 60 seconds for opening a backend before it gives up."""
_SUFFIXES = ("/hicache/status", "/hicache")


def asks(command: F) -> F:
    """Gives a command the argument ``url`` and the option ``--api-key``."""
    key = click.option(
        "--api-key",
        envvar="HICACHE_API_KEY",
        help="API key of the server. Prefer the environment variable HICACHE_API_KEY.",
    )
    return key(click.argument("url", required=False, callback=_found)(command))


def operates(command: F) -> F:
    """As :func:`asks`, for a call of the operator, which needs the admin key."""
    key = click.option(
        "--api-key",
        envvar=["HICACHE_ADMIN_API_KEY", "HICACHE_API_KEY"],
        help="Admin key of the server, if it has one. Prefer the environment variable "
        "HICACHE_ADMIN_API_KEY.",
    )
    return key(click.argument("url", required=False, callback=_found)(command))


def _found(_ctx: click.Context, _parameter: click.Parameter, url: str | None) -> str:
    """The given URL; without one, the first of ``DEFAULT_URLS`` that accepts a connection."""
    if url is not None:
        return url
    for usual in DEFAULT_URLS:
        host, _, port = usual.removeprefix("http://").partition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
        except OSError:
            continue
        return usual
    raise click.ClickException(
        f"nothing listens at {' or '.join(DEFAULT_URLS)}; give the URL of a running cache"
    )


def with_scheme(url: str) -> str:
    """``url`` as it is, or with ``http://`` before it if it names no scheme."""
    return url if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", url) else f"http://{url}"


def base_of(url: str) -> str:
    """``url`` with a scheme, and without the path of the page or the status."""
    base = with_scheme(url).rstrip("/")
    for suffix in _SUFFIXES:
        base = base.removesuffix(suffix)
    return base


def _checked(address: str, key: str | None) -> dict[str, str]:
    """The headers of a request to ``address``; a key is never in a message.

    Raises:
        ConfigError: that is not the address of a server, or no header can have that key.
    """
    try:
        parts = urlsplit(address)
        is_server = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_server = is_server and parts.port != 0 and not re.search(r"[\s\x00-\x1f\x7f]", address)
    except ValueError:
        is_server = False
    if not is_server or not address.isascii():
        raise ConfigError(
            f"{masked_text(address)!r} is not the address of a server; write http://HOST:PORT"
        )
    if key is None:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            "the API key has a character that no header can carry, such as the end of a line; "
            "give the key alone"
        )
    return {"Authorization": f"Bearer {key}"}


def ask(url: str, path: str, *, key: str | None = None) -> Any:
    """The answer of a status server, as JSON values.

    Args:
        url: address of the server, with or without scheme and path of the page.
        path: path of the request, such as ``/hicache/status``.
        key: API key, if the server needs one.

    Raises:
        click.ClickException: nothing answers, or what answers is not a cache.
        ConfigError: the address or the key cannot be one.
    """
    address = base_of(url) + path
    shown = masked_text(address)
    headers = _checked(address, key)
    try:
        # Never through a proxy: a status server listens on loopback or in the cluster.
        opener = build_opener(ProxyHandler({}))
        with opener.open(Request(address, headers=headers), timeout=_TIMEOUT_S) as response:
            return json.load(response)
    except HTTPError as error:
        with error:
            reason = (
                ("it refuses this API key" if key else "it needs --api-key")
                if error.code in (401, 403)
                else "this is not the status server of a cache"
            )
            raise click.ClickException(f"{shown} answers {error.code}; {reason}") from error
    except (URLError, OSError, HTTPException) as error:
        reason = str(error.reason if isinstance(error, URLError) else error)
        raise click.ClickException(
            f"no answer from {shown} ({reason}); is the cache running with its status server?"
        ) from error
    except ValueError as error:
        raise click.ClickException(f"the answer from {shown} is not JSON") from error


def post(url: str, path: str, body: object, *, key: str | None = None, timeout_s: float) -> Any:
    """What a server answers to a body of JSON, as JSON values.

    Args:
        url: as for :func:`ask`.
        path: as for :func:`ask`.
        body: JSON values.
        key: as for :func:`ask`.
        timeout_s: how long to wait for the answer.

    Raises:
        click.ClickException: nothing answers, or the server refuses; the message is the server's.
    """
    answer = tell(url, "POST", path, key=key, body=body, timeout_s=timeout_s)
    try:
        return json.loads(answer)
    except ValueError as error:
        shown = masked_text(base_of(url) + path)
        raise click.ClickException(f"the answer from {shown} is not JSON") from error


def tell(
    url: str,
    method: str,
    path: str,
    *,
    key: str | None = None,
    body: object = None,
    timeout_s: float = _CHANGE_TIMEOUT_S,
) -> str:
    """Makes a call of the operator; returns what the server answered.

    Args:
        url: address of the server, with or without a scheme.
        method: of the request, such as ``PUT``.
        path: of the request.
        key: the admin key, or the API key of a server without one.
        body: is sent as JSON; None for none.
        timeout_s: how long the server may take.

    Raises:
        click.ClickException: nothing answers, or the server refuses; the message is its own.
        ConfigError: the address or the key cannot be one.
    """
    address = base_of(url) + path
    shown = masked_text(address)
    headers = _checked(address, key)
    data = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        data = json.dumps(body).encode()
    request = Request(address, data=data, headers=headers, method=method)
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=timeout_s) as response:
            return str(response.read().decode())
    except HTTPError as error:
        with error:
            reason = _reason(error)
        raise click.ClickException(f"{shown} answers {error.code}: {reason}") from error
    except (URLError, OSError, HTTPException) as error:
        reason = str(error.reason if isinstance(error, URLError) else error)
        raise click.ClickException(f"no answer from {shown} ({reason})") from error


def _reason(error: HTTPError) -> str:
    """What a server says of a request that it refuses."""
    if error.code in (404, 405, 501):
        return "it has no such call; only hicache serve has it, not a status server or a router"
    try:
        said = masked_text(str(json.load(error)["error"]["message"]))
    except (KeyError, TypeError, ValueError):
        return "this is not a server of HiCache, or one of another version"
    hint = "; give it with --api-key" if error.code in (401, 403) and "key" in said else ""
    return f"{said}{hint}"


def observed(answer: Any, url: str) -> Observation:
    """The status in what the server at ``url`` answered.

    Raises:
        click.ClickException: the answer comes from another version.
    """
    try:
        return TypeAdapter(Observation).validate_python(answer)
    except ValidationError as error:
        raise click.ClickException(
            f"this version cannot read the status of {masked_text(url)} "
            f"({error.error_count()} fields differ); does the cache run another version?"
        ) from error


def ask_if_there(url: str, path: str, *, key: str | None = None) -> Any:
    """As :func:`ask`, but returns ``{}`` where :func:`ask` would raise.

    Args:
        url: as for :func:`ask`.
        path: as for :func:`ask`.
        key: as for :func:`ask`.
    """
    try:
        return ask(url, path, key=key)
    except click.ClickException:
        return {}
