"""Print the versions of hicache-core, Python and the main dependencies."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import click

_DISTRIBUTIONS = ("hicache-core", "pluggy", "pydantic", "torch", "transformers")


@click.command("version")
def command() -> None:
    """Print the versions that a bug report needs."""
    for name in _DISTRIBUTIONS:
        try:
            click.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            click.echo(f"{name} is not installed")
    click.echo(f"python {platform.python_version()} on {platform.platform()}")
