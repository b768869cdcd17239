"""Empty the device and host tiers of a running server."""

from __future__ import annotations

import json

import click

from hicache_core.cli._ask import base_of, operates, tell
from hicache_core.config.flags import FiniteRange
from hicache_core.config.redact import masked_text

_SPARE_S = 30.0


@click.command("flush")
@operates
@click.option(
    "--timeout",
    "timeout_s",
    type=FiniteRange(0, 600),
    default=0.0,
    show_default=True,
    help="Seconds to wait until no request uses the cache.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(*, url: str, api_key: str | None, timeout_s: float, as_json: bool) -> None:
    """Empty device and host of the server at URL, as soon as no request uses them.

    Storage keeps its pages. The exit status is 1 if something was in use all the time.
    """
    call = f"/flush_cache?timeout={timeout_s:g}"
    said = tell(url, "POST", call, key=api_key, timeout_s=timeout_s + _SPARE_S).rstrip()
    server = {"url": masked_text(base_of(url)), "flushed": True}
    click.echo(json.dumps(server) if as_json else said)
