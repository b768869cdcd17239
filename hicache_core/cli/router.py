"""Serve one address in front of prefill and decode servers."""

from __future__ import annotations

import importlib.util
import logging
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import click

from hicache_core.config.flags import FiniteRange
from hicache_core.errors import ConfigError

_NEEDED = ("httpx", "starlette", "uvicorn")
if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise ConfigError(
        f"hicache router needs {', '.join(missing)}: pip install 'hicache-core[router]'"
    )

import uvicorn  # noqa: E402 - only if installed

from hicache_core.cli._ask import with_scheme  # noqa: E402 - likewise
from hicache_core.config.hosts import is_loopback  # noqa: E402 - likewise
from hicache_core.kv_transfer.secret import MIN_LENGTH  # noqa: E402 - likewise
from hicache_core.router.app import make_app  # noqa: E402 - likewise
from hicache_core.router.nodes import RouterSettings  # noqa: E402 - likewise
from hicache_core.server.access import Keys, is_operator  # noqa: E402 - likewise
from hicache_core.server.connections import bounded  # noqa: E402 - likewise


@click.command("router")
@click.option("--prefill", multiple=True, metavar="URL", help="A prefill server. May be repeated.")
@click.option(
    "--decode",
    multiple=True,
    required=True,
    metavar="URL",
    help="A decode server. May be repeated.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 for any free port.",
)
@click.option(
    "--health-interval",
    "interval_s",
    type=FiniteRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two health checks of a server.",
)
@click.option(
    "--by-prefix/--by-load",
    default=True,
    show_default=True,
    help="Prefer the server that computed most of the prompt before, or the least loaded one.",
)
@click.option(
    "--api-key",
    envvar="HICACHE_API_KEY",
    default="",
    help="API key for health checks. Environment: HICACHE_API_KEY.",
)
@click.option(
    "--admin-api-key",
    envvar="HICACHE_ADMIN_API_KEY",
    help="Key of operators, who may read /router/status and see which nodes answered. Default: "
    "clients on this machine are operators. Environment: HICACHE_ADMIN_API_KEY.",
)
@click.option(
    "--disaggregation-secret",
    envvar="HICACHE_DISAGGREGATION_SECRET",
    help="Secret shared with the nodes, which then accept requests of this router only. Prefer "
    "the environment variable HICACHE_DISAGGREGATION_SECRET.",
)
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    help="Level of the log: debug, info, warning or error.",
)
def command(prefill: tuple[str, ...], decode: tuple[str, ...], **options: Any) -> None:
    """Route OpenAI-compatible requests to pairs of a prefill and a decode server."""
    prefill, decode = (tuple(map(with_scheme, urls)) for urls in (prefill, decode))
    for url in (*prefill, *decode):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is not the URL of a server; write http://host:port")
    secret = _checked(options["disaggregation_secret"] or None, (*prefill, *decode))
    level, host, port = options["log_level"], options["host"], options["port"]
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each health check
    settings = RouterSettings(
        prefill,
        decode,
        api_key=options["api_key"],
        secret=secret,
        by_prefix=options["by_prefix"],
        interval_s=options["interval_s"],
    )
    keys = Keys(admin=options["admin_api_key"] or None)
    app = make_app(settings, is_operator=partial(is_operator, keys=keys))
    uvicorn.run(app, host=host, port=port, log_level=level.lower(), access_log=False, **bounded())


def _checked(secret: str | None, urls: tuple[str, ...]) -> str | None:
    """Returns ``secret``; warns if nodes on other machines need one.

    Raises:
        ConfigError: the secret is too short for the nodes.
    """
    if secret is not None and len(secret) < MIN_LENGTH:
        raise ConfigError(
            f"--disaggregation-secret has {len(secret)} characters and needs at least "
            f"{MIN_LENGTH}; make one with: openssl rand -hex 32"
        )
    if secret is None and not all(is_loopback(urlsplit(url).hostname or "") for url in urls):
        click.echo(
            "hicache: no --disaggregation-secret is set; nodes on other machines accept requests "
            "only from a router that has theirs",
            err=True,
        )
    return secret
