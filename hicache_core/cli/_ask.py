"""The question to a running cache: JSON from a path of its status server."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import click

from hicache_core.config.redact import masked_text

DEFAULT_URLS = ("http://127.0.0.1:30000", "http://127.0.0.1:9477")
"""Where ``hicache serve`` listens by default, and a status server."""
F = TypeVar("F", bound=Callable[..., object])
_TIMEOUT_S = 10.0
_SUFFIXES = ("/hicache/status", "/hicache")


def asks(command: F) -> F:
    """The argument and the option of a command that asks a cache: ``url``, ``api_key``."""
    key = click.option(
        "--api-key",
        envvar="HICACHE_API_KEY",
        help="The key that the server asks for; best by the environment, HICACHE_API_KEY.",
    )
    return key(click.argument("url", required=False, callback=_found)(command))


def _found(_ctx: click.Context, _parameter: click.Parameter, url: str | None) -> str:
    """The cache that is meant: without a URL the first of the usual places where one listens."""
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
        f"nobody listens at {' or '.join(DEFAULT_URLS)}; give the URL of a running cache"
    )


def base_of(url: str) -> str:
    """``url`` with a scheme, and without the path of the page or the status."""
    base = (url if re.match(r"https?://", url) else f"http://{url}").rstrip("/")
    for suffix in _SUFFIXES:
        base = base.removesuffix(suffix)
    return base


def ask(url: str, path: str, *, key: str | None = None) -> Any:
    """What ``path`` of the server at ``url`` answers, as JSON values.

    Raises:
        click.ClickException: nobody answers, or something that is no cache.
    """
    address = base_of(url) + path
    shown = masked_text(address)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        # Never through a proxy: a status server listens on loopback or in the cluster.
        opener = build_opener(ProxyHandler({}))
        with opener.open(Request(address, headers=headers), timeout=_TIMEOUT_S) as response:
            return json.load(response)
    except HTTPError as error:
        with error:
            reason = (
                ("it does not take that key" if key else "it wants --api-key")
                if error.code in (401, 403)
                else "that is no status server of a cache"
            )
            raise click.ClickException(f"{shown} answers {error.code}; {reason}") from error
    except (URLError, OSError) as error:
        reason = str(error.reason if isinstance(error, URLError) else error)
        raise click.ClickException(
            f"nobody answers at {shown} ({reason}); is the cache running with its status server?"
        ) from error
    except ValueError as error:
        raise click.ClickException(f"{shown} answers no JSON") from error


def ask_if_there(url: str, path: str, *, key: str | None = None) -> Any:
    """As :func:`ask`, but nothing, ``{}``, from a server that answers otherwise or not there."""
    try:
        return ask(url, path, key=key)
    except click.ClickException:
        return {}
