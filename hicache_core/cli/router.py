"""One address before prefill and decode servers."""

from __future__ import annotations

import importlib.util
import logging
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import click

from hicache_core.errors import ConfigError

_NEEDED = ("fastapi", "httpx", "uvicorn")
if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise ConfigError(
        f"hicache router needs {', '.join(missing)}: pip install 'hicache-core[router]'"
    )

import uvicorn  # noqa: E402 - only if installed

from hicache_core.config.hosts import is_loopback  # noqa: E402 - likewise
from hicache_core.kv_transfer.secret import MIN_LENGTH  # noqa: E402 - likewise
from hicache_core.router.app import make_app  # noqa: E402 - likewise
from hicache_core.router.nodes import RouterSettings  # noqa: E402 - likewise
from hicache_core.server.access import Keys, is_operator  # noqa: E402 - likewise
from hicache_core.server.connections import bounded  # noqa: E402 - likewise


@click.command("router")
@click.option("--prefill", multiple=True, metavar="URL", help="A prefill server; repeat it.")
@click.option("--decode", multiple=True, required=True, metavar="URL", help="A decode server.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--health-interval",
    "interval_s",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two health checks of a server.",
)
@click.option(
    "--by-prefix/--by-load",
    default=True,
    show_default=True,
    help="Send a prompt where most of it was computed before, or always to the idlest server.",
)
@click.option(
    "--api-key", envvar="HICACHE_API_KEY", default="", help="For health checks; HICACHE_API_KEY."
)
@click.option(
    "--admin-api-key",
    envvar="HICACHE_ADMIN_API_KEY",
    help="Opens /router/status and shows which nodes answered; HICACHE_ADMIN_API_KEY. Default: "
    "for clients on this very machine.",
)
@click.option(
    "--disaggregation-secret",
    envvar="HICACHE_DISAGGREGATION_SECRET",
    help="What the nodes know too: they take requests of this router alone. Prefer the "
    "environment, HICACHE_DISAGGREGATION_SECRET.",
)
@click.option("--log-level", default="info", show_default=True)
def command(prefill: tuple[str, ...], decode: tuple[str, ...], **options: Any) -> None:
    """Route OpenAI-compatible requests to pairs of a prefill and a decode server."""
    for url in (*prefill, *decode):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no URL of a server; write http://host:port")
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
    """Raises ConfigError: the secret is too short for the nodes."""
    if secret is not None and len(secret) < MIN_LENGTH:
        raise ConfigError(
            f"--disaggregation-secret has {len(secret)} characters; {MIN_LENGTH} are the least: "
            "openssl rand -hex 32"
        )
    if secret is None and not all(is_loopback(urlsplit(url).hostname or "") for url in urls):
        click.echo(
            "hicache: nodes on other machines take requests of a router that has their "
            "--disaggregation-secret, and none is set",
            err=True,
        )
    return secret
