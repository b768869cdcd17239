"""Serve a model with an OpenAI-compatible API over the cache."""

from __future__ import annotations

import importlib.util
import logging

import click

from hicache_core.errors import ConfigError

_NEEDED = ("torch", "transformers", "fastapi", "uvicorn", "prometheus_client")
if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise ConfigError(
        f"hicache serve needs {', '.join(missing)}: pip install 'hicache-core[server]'"
    )

from hicache_core.server.flags import server_flags, settings_of  # noqa: E402 - only if installed


@click.command("serve")
@server_flags
def command(**options: object) -> None:
    """Serve a model over HTTP, with the flags of SGLang's server.

    Ends on SIGTERM or Ctrl-C, once running requests and backups have ended or timed out.
    """
    settings = settings_of(options)
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    from hicache_core.server.run import serve

    serve(settings, lambda line: click.echo(line, err=False))
