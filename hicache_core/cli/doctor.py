"""Diagnose a backend's store: what works, what does not, and what to change."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from hicache_core.cli._backend import BackendChoice, names_backend
from hicache_core.testing.doctor import examine
from hicache_core.testing.features import Target
from hicache_core.testing.kit_settings import QUICK

_STATUS = {"ok": 0, "warning": 1, "error": 2}


@click.command("doctor")
@names_backend()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, *, backend: BackendChoice, as_json: bool) -> None:
    """Examine the store of the backend NAME: open it, run its checks, a round trip, the speed.

    The exit status is the worst finding: 0 ok, 1 warning, 2 error.
    """
    recipe = backend.recipe()
    recipe.make()
    findings = []
    for finding in examine(Target(recipe), QUICK):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.level:8} {finding.topic:12} {finding.message}")
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    ctx.exit(max((_STATUS[finding.level] for finding in findings), default=0))
