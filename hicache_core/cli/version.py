"""Print the versions of HiCache, its plugins, Python and the main dependencies."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import click

from hicache_core.plugin.manager import list_backends, list_transfer_backends

_DISTRIBUTIONS = ("pluggy", "pydantic", "torch", "transformers")
NATIVE = {
    "keys": "hicache_core.kv._page_keys",
    "pools": "hicache_core.pools._page_marks",
    "copies": "hicache_core.copies._transfer",
}


@click.command("version")
def command() -> None:
    """Print the versions that a bug report needs: HiCache, its plugins and the main dependencies.

    It imports no plugin, and no library for a model.
    """
    for name in ("hicache-core", *_plugins(), *_DISTRIBUTIONS):
        try:
            click.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            click.echo(f"{name} is not installed")
    click.echo(f"python {platform.python_version()} on {platform.platform()}")
    for part, module in NATIVE.items():
        click.echo(f"{part}: {implementation(module)}")


def _plugins() -> list[str]:
    """The distributions that offer backends, by name; without the core."""
    infos = [*list_backends(), *list_transfer_backends()]
    return sorted({info.distribution for info in infos} - {"hicache-core", ""})


def implementation(module: str) -> str:
    """Whether a part with a pure Python twin runs as native code, in words."""
    if os.environ.get("HICACHE_PURE_PYTHON") == "1":
        return "pure Python, since HICACHE_PURE_PYTHON is 1"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"pure Python, since the native module is missing ({error})"
    return "native"
