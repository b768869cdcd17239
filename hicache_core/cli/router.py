"""One address before prefill and decode servers."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import click

from hicache_core.errors import ConfigError

_NEEDED = ("fastapi", "httpx", "uvicorn")
if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise ConfigError(
        f"hicache router needs {', '.join(missing)}: pip install 'hicache-core[router]'"
    )

import uvicorn  # noqa: E402 - only if installed

from hicache_core.disaggregation.router import make_app  # noqa: E402 - likewise
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
@click.option("--log-level", default="info", show_default=True)
def command(prefill: tuple[str, ...], decode: tuple[str, ...], **options: Any) -> None:
    """Route OpenAI-compatible requests to pairs of a prefill and a decode server."""
    for url in (*prefill, *decode):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no URL of a server; write http://host:port")
    level, host, port = options["log_level"], options["host"], options["port"]
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each health check
    app = make_app(
        prefill,
        decode,
        api_key=options["api_key"],
        by_prefix=options["by_prefix"],
        interval_s=options["interval_s"],
    )
    uvicorn.run(app, host=host, port=port, log_level=level.lower(), access_log=False, **bounded())
