"""Writes ``deploy/hicache.toml``, a configuration file with every setting: ``make config``."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from hicache_core.config.messages import allowed_values
from hicache_core.config.settings import ControllerKeys, HiCacheConfig
from hicache_core.config.sources import EXTRA, env_name, flag_name
from hicache_core.observe.event_settings import EventsConfig

FILE = Path(__file__).resolve().parents[1] / "deploy" / "hicache.toml"
_EVENTS = "kv_events_config"
_WIDTH = 100
_HEAD = """\
Every setting of HiCache with its default. Remove the # in front of a setting to change it.

`hicache serve --config hicache.toml` reads this file. So does every command with these settings
if the environment variable HICACHE_CONFIG names it. A setting is also a flag and an environment
variable, which both win over this file. `hicache config` prints the values in force, and
`hicache config --schema` the JSON schema of this file.

Unless enable_hierarchical_cache is set, `hicache serve` takes false, as SGLang does.

`make config` writes this file from the settings.
"""
_OF_BACKENDS = """\
All other keys of this table are settings of the storage backend: path = "/var/lib/hicache/kv"
for `file`, url = "redis://127.0.0.1:6379" for `redis`. The page of each backend lists them, and so
does `hicache config --schema --hicache-storage-backend NAME`.
"""


def config_file() -> str:
    """The text of the file."""
    tables = (EXTRA, _EVENTS)
    parts = [_comment(_HEAD)]
    parts += [
        _setting(HiCacheConfig, key) for key in HiCacheConfig.model_fields if key not in tables
    ]
    parts += [
        _table(EXTRA),
        *(_setting(ControllerKeys, key) for key in ControllerKeys.model_fields),
    ]
    parts += [_comment(_OF_BACKENDS), _table(_EVENTS), "\n".join(_events())]
    return "\n\n".join(parts) + "\n"


def _setting(model: type[BaseModel], key: str) -> str:
    """One setting, after what it means."""
    info = model.model_fields[key]
    lines = [(info.description or "").replace("`", "")]
    if allowed := allowed_values(model, key):
        lines.append(f"Allowed: {allowed}.")
    if model is HiCacheConfig:
        lines.append(f"{flag_name(key)}, {env_name(key)}")
    # TOML has no null: the settings of the cache take the word none, those of tables are left out.
    if info.default is None and model is not HiCacheConfig:
        return "\n".join([*map(_comment, lines), f"# {key} is not set."])
    value = "none" if info.default is None else info.default
    return "\n".join([*map(_comment, lines), f"#{key} = {json.dumps(value)}"])


def _table(key: str) -> str:
    text = (HiCacheConfig.model_fields[key].description or "").replace("`", "")
    return f"{_comment(text)}\n{_comment(f'{flag_name(key)}, {env_name(key)}')}\n#[{key}]"


def _events() -> Iterator[str]:
    yield _comment("docs/kv-events.md has their meaning. An empty table publishes nothing.")
    for field in dataclasses.fields(EventsConfig):
        if field.default is None:
            yield f"# {field.name} is not set."
        else:
            yield f"#{field.name} = {json.dumps(field.default)}"


def _comment(text: str) -> str:
    """Lines that begin with ``# ``; a setting that is commented out has no space there."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, _WIDTH - 2) or [""]]
    return "\n".join(f"# {line}".rstrip() for line in lines)


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(config_file(), encoding="utf-8")
