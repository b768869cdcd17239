"""Write a working plugin for a new storage backend, as a starting point."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import click

from hicache_core.errors import ConfigError
from hicache_core.plugin.manager import list_backends

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_SUFFIX = ".template"
_RESERVED = frozenset(["dynamic", "core"])


def check_name(name: str) -> None:
    """Checks that ``name`` can be the name of a backend.

    Raises:
        ConfigError: it is malformed, reserved, a Python keyword, or an installed backend has it.
    """
    if not _NAME.fullmatch(name) or len(name) > 40:
        raise ConfigError(
            f"{name!r} cannot name a backend: use at most 40 lower-case letters, digits and single"
            " - or _ between them, with a letter first, like 'mystore' or 'my-store'"
        )
    if name in _RESERVED or keyword.iskeyword(name):
        raise ConfigError(f"{name!r} cannot name a backend: the word is reserved; choose another")
    if name in {info.name for info in list_backends()}:
        raise ConfigError(f"a backend named {name!r} is installed already; choose another name")


def render(name: str, directory: Path) -> Path:
    """Writes the distribution ``hicache-<name>`` into ``directory`` and returns its folder.

    Raises:
        ConfigError: the name cannot be used, or the folder exists already.
    """
    check_name(name)
    target = directory / f"hicache-{name}"
    if target.exists():
        raise ConfigError(f"{target} exists already; move it away, or give another --directory")
    words = re.split(r"[-_]", name)
    values = {
        "@NAME@": name,
        "@PACKAGE@": "hicache_" + "_".join(words),
        "@CLASS@": "".join(word.capitalize() for word in words),
    }
    _render(files("hicache_core.cli") / "templates" / "backend", target, values)
    return target


def _render(source: Traversable, target: Path, values: dict[str, str]) -> None:
    if source.is_dir():
        target.mkdir(parents=True)
        for child in source.iterdir():
            if child.name == "__pycache__":
                continue
            name = child.name.removesuffix(_SUFFIX).replace("PACKAGE", values["@PACKAGE@"])
            _render(child, target / name, values)
        return
    text = source.read_text(encoding="utf-8")
    for mark, value in values.items():
        text = text.replace(mark, value)
    target.write_text(text, encoding="utf-8")


@click.command("new-backend")
@click.argument("name")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where to write it. Default: the working directory.",
)
def command(*, name: str, directory: Path) -> None:
    """Write a working distribution with its conformance test to DIRECTORY/hicache-NAME."""
    target = render(name, directory)
    click.echo(f"{target} is ready. Next:")
    click.echo(f"  pip install -e '{target}[testing]'")
    click.echo(f"  pytest {target}")
    click.echo(f"Then implement your store in {next(target.glob('src/*/backend.py'))}.")
