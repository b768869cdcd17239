"""Watch a running cache: tiers, hit rates, bandwidths, breakers, slowest requests."""

from __future__ import annotations

import sys
import time
from typing import Any

import click
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from hicache_core.cli._ask import ask, ask_if_there, asks, base_of, observed
from hicache_core.cli._cache_view import Moment, Rates, console, rates_of, top_view
from hicache_core.config.flags import FiniteRange
from hicache_core.config.redact import masked_text


@click.command("top")
@asks
@click.option(
    "--once", is_flag=True, help="Print one view and exit. This is the default in a pipe."
)
@click.option(
    "--interval",
    "interval_s",
    type=FiniteRange(min=0.2),
    default=1.0,
    show_default=True,
    help="Seconds between two updates.",
)
def command(*, url: str, once: bool, interval_s: float, api_key: str | None) -> None:
    """Watch the cache at URL until Ctrl-C.

    Without a URL: the server on this machine at port 30000, or a status server at port 9477.
    """
    out = console()
    if once or not sys.stdout.isatty():
        out.print(top_view(_look(url, api_key, None)))
        return
    moment: Moment | None = None
    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            try:
                moment = _look(url, api_key, moment)
                view: RenderableType = top_view(moment)
            except click.ClickException as error:
                if moment is None:
                    raise
                view = Text(
                    f"{error.message}\ntrying again; press Ctrl-C to exit", style="bold red"
                )
            live.update(view, refresh=True)
            time.sleep(interval_s)


def _look(url: str, key: str | None, before: Moment | None) -> Moment:
    """Asks the server once; rates come from its history since the sample before ``before``."""
    answer = ask(url, "/hicache/status", key=key)
    after = 0 if before is None else before.last_sample - Rates.SPAN
    history = ask_if_there(url, f"/hicache/history?after={max(0, after)}", key=key)
    samples: list[dict[str, Any]] = history.get("samples", [])
    requests = ask_if_there(url, "/hicache/requests?limit=200", key=key).get("requests", [])
    return Moment(
        url=masked_text(base_of(url)),
        seen=observed(answer, url),
        rates=rates_of(samples),
        requests=requests,
        engine=answer.get("engine") or ask_if_there(url, "/hicache/engine", key=key),
        last_sample=samples[-1]["n"] if samples else 0,
    )
