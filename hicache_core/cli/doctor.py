"""Diagnose a backend's store: what works, what does not, and what to change."""

from __future__ import annotations

import click

from hicache_core.config.sources import read_inline
from hicache_core.testing.doctor import examine
from hicache_core.testing.features import Target
from hicache_core.testing.kit_settings import QUICK
from hicache_core.testing.recipe import Recipe

_STATUS = {"ok": 0, "warning": 1, "error": 2}


@click.command("doctor")
@click.argument("name")
@click.option("--config", default="{}", help="The backend's settings: JSON text, or @file.")
@click.pass_context
def command(ctx: click.Context, *, name: str, config: str) -> None:
    """Examine the store of the backend NAME: open it, run its checks, a round trip, the speed.

    The exit status is the worst finding: 0 ok, 1 warning, 2 error.
    """
    recipe = Recipe.named(name, read_inline(config, what="--config: "))
    recipe.make()
    worst = 0
    for finding in examine(Target(recipe), QUICK):
        worst = max(worst, _STATUS[finding.level])
        click.echo(f"{finding.level:8} {finding.topic:12} {finding.message}")
    ctx.exit(worst)
