"""Print the status of a running cache: tiers, hit rates, storage, alarms."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from hicache_core.cli._ask import ask, asks, observed
from hicache_core.cli._cache_view import console, status_view
from hicache_core.config.flags import FiniteRange


@click.command("status")
@asks
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--watch",
    "watch_s",
    type=FiniteRange(min=0.1),
    metavar="SECONDS",
    help="Repeat every so many seconds.",
)
def command(*, url: str, api_key: str | None, as_json: bool, watch_s: float | None) -> None:
    """Print the status of the cache at URL.

    Without a URL: the server on this machine at port 30000, or a status server at port 9477.
    """
    while True:
        _show(ask(url, "/hicache/status", key=api_key), as_json=as_json, url=url)
        if watch_s is None:
            return
        time.sleep(watch_s)
        if not as_json:
            click.clear()


def _show(answer: Any, *, as_json: bool, url: str) -> None:
    if as_json:
        click.echo(json.dumps(answer))
        return
    console(least_width=110).print(status_view(observed(answer, url)))
