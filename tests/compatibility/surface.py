"""What users call by name: settings, flags, series, formats, entry points; each with its meaning.

python -m tests.compatibility.surface > tests/compatibility/surface-0.1.0.json
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from hicache_core.cli.main import cli
from hicache_core.config.settings import ControllerKeys, HiCacheConfig
from hicache_core.config.sources import env_name, flag_name
from hicache_core.kv.keys import FORMAT_VERSION, object_keys, page_digests, storage_namespace
from hicache_core.kv_transfer import base as transfers
from hicache_core.kv_transfer import wire
from hicache_core.observe import event_format
from hicache_core.observe.catalogue import SERIES
from hicache_core.observe.journal import PageRun
from hicache_core.storage import base, sealed
from hicache_core.storage.file import index, records
from hicache_core.types import Tier

ROOT = Path(__file__).parents[2]
GROUPS = {
    "hicache.backends": "hicache_backends",
    "hicache.transfer_backends": "hicache_transfer_backends",
}
"""The groups of entry points, and the hook of each."""

Rows = Iterator[tuple[str, Any]]


def _fields(owner: str, model: type[BaseModel]) -> Rows:
    """The settings of a model: type, limits and default; how they are described may change."""
    schema = model.model_json_schema()
    told = {"description", "title", "allowed"}
    for name, described in schema.get("properties", {}).items():
        meaning = {key: value for key, value in described.items() if key not in told}
        yield f"setting {owner}.{name}", meaning


def settings() -> Rows:
    """The settings of the cache, with their flags and variables, and those of each backend."""
    yield from _fields("HiCacheConfig", HiCacheConfig)
    yield from _fields("extra_config", ControllerKeys)
    for name in HiCacheConfig.model_fields:
        yield f"flag of {name}", flag_name(name)
        yield f"variable of {name}", env_name(name)
    for group, hook in GROUPS.items():
        for point in entry_points(group=group):
            for kind in getattr(point.load(), hook)():
                if kind.name == point.name:
                    yield from _fields(f"{group}:{kind.name}", kind.Config)


def commands(command: click.Command = cli, name: str = "hicache") -> Rows:
    """Every command with its arguments and flags: each spelling, and what it is without it."""
    n_arguments = 0
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            n_arguments += 1
            yield f"argument {name} {n_arguments}", parameter.nargs
            continue
        default = parameter.default
        shown = default if isinstance(default, str | int | float | bool) else None
        for spelt in (*parameter.opts, *parameter.secondary_opts):
            yield f"option {name} {spelt}", [parameter.nargs, parameter.multiple, shown]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield f"command {name} {inner}", True
            yield from commands(found, f"{name} {inner}")


def series() -> Rows:
    """The metrics of a cache."""
    for section in SERIES.values():
        for one in section:
            yield f"series {one.name}", [one.kind, one.unit, sorted(one.labels), one.sglang]


def formats() -> Rows:
    """What other processes and other times read: versions, marks, and the name of a page."""
    yield "format of transfers", [wire.PROTOCOL, wire._MAGIC.decode(), wire._HEADER.format]
    yield "frames of transfers", {kind.name: int(kind) for kind in wire.Kind}
    yield "api of transfer backends", transfers.API_VERSION
    yield "api of storage backends", base.API_VERSION
    yield "format of objects", [sealed.MAGIC.decode(), sealed.VERSION, sealed.HEADER_NBYTES]
    yield "format of the file store", [index.FORMAT_VERSION, records._VERSION]
    yield "format of keys", FORMAT_VERSION
    namespace = storage_namespace({"model": "m"}, 4, "page_first")
    yield "key of a page", object_keys(namespace, page_digests(bytes(range(16)), 4))
    run = PageRun(b"", page_digests(bytes(range(16)), 4), bytes(range(16)), b"")
    yield "event of a stored page", event_format.stored(Tier.HOST, run)
    yield "event of a removed page", event_format.removed(Tier.STORAGE, run)


def distributions() -> Rows:
    """Of each distribution: its entry points by group and name, and its extras."""
    for file in [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]:
        project = tomllib.loads(file.read_text())["project"]
        for command in project.get("scripts", {}):
            yield f"script {project['name']} {command}", True
        for group, points in project["entry-points"].items():
            for point in points:
                yield f"entry point {project['name']} {group} {point}", True
        for extra in project.get("optional-dependencies", {}):
            yield f"extra {project['name']}[{extra}]", True


def surface() -> dict[str, Any]:
    """All of it, as JSON holds it."""
    rows: dict[str, Any] = {}
    for part in (settings(), commands(), series(), formats(), distributions()):
        rows.update(part)
    parsed: dict[str, Any] = json.loads(json.dumps(rows))
    return parsed


if __name__ == "__main__":
    lines = (
        f"{json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in sorted(surface().items())
    )
    print("{\n" + ",\n".join(lines) + "\n}")
