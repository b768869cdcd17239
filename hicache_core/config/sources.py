"""Where settings come from (files, environment, JSON text), and which source wins."""

from __future__ import annotations

import difflib
import json
import logging
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from hicache_core.errors import ConfigError

DEFAULT = "default"
ARGUMENT = "argument"
EXTRA = "hicache_storage_backend_extra_config"
ENV_PREFIX = "HICACHE_"
CONFIG_FILE = "HICACHE_CONFIG"
"""The variable that names the configuration file."""
_OTHER_VARIABLES = (
    CONFIG_FILE,
    "HICACHE_API_KEY",
    "HICACHE_ADMIN_API_KEY",
    "HICACHE_DISAGGREGATION_SECRET",
    "HICACHE_PURE_PYTHON",
)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layered:
    """Settings merged from several sources.

    Attributes:
        values: the winning value of each key that any source sets.
        sources: for each of these keys, where its value came from, in words.
    """

    values: dict[str, object] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def add(self, values: Mapping[str, object], source_of: Callable[[str], str]) -> None:
        """Adds ``values``; for each key the value added last wins.

        Args:
            values: settings by name.
            source_of: gives the source of a key, in words.
        """
        for key, value in values.items():
            self.values[key] = value
            self.sources[key] = source_of(key)


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the name most similar to ``name``, or an empty string."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def flag_name(key: str) -> str:
    """``page_size`` -> ``--page-size``."""
    return "--" + key.replace("_", "-")


def env_name(key: str) -> str:
    """``page_size`` -> ``HICACHE_PAGE_SIZE``; ``hicache_ratio`` -> ``HICACHE_RATIO``."""
    return ENV_PREFIX + key.removeprefix("hicache_").upper()


def read_environ(keys: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The settings in the environment; an empty variable counts as unset.

    Other variables that start with ``HICACHE_`` are ignored, since plugins have their own. One that
    is nearly the name of a setting is logged as a warning.
    """
    by_env = {env_name(key): key for key in keys}
    for name, meant in mistyped(by_env.values(), environ):
        _logger.warning("%s is ignored; did you mean %s?", name, meant)
    return {key: environ[name] for name, key in by_env.items() if environ.get(name)}


def mistyped(keys: Iterable[str], environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """The variables whose name is nearly that of a setting, each with the name that was meant.

    ``HICACHE_HICACHE_RATIO`` is one of them: the name of ``hicache_ratio`` in capitals would be.
    """
    known = [*map(env_name, keys), *_OTHER_VARIABLES]
    found = []
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known:
            once = ENV_PREFIX + name.removeprefix(ENV_PREFIX).removeprefix(ENV_PREFIX)
            close = difflib.get_close_matches(once, known, n=1, cutoff=0.9)
            found += [(name, meant) for meant in close]
    return found


def read_file(path: str | os.PathLike[str], what: str = "configuration file") -> dict[str, object]:
    """The mapping in a .json, .toml, .yaml or .yml file.

    Raises:
        ConfigError: the file is missing or unreadable, its suffix or its syntax is wrong, or it
            does not hold a mapping; the message names the file.
    """
    file = Path(path).expanduser()
    parse = _PARSERS.get(file.suffix.lower())
    if parse is None:
        raise ConfigError(f"{what} {file}: the name must end in {', '.join(_PARSERS)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{what} {file}: no such file (working directory {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {file}: cannot be read: {error}") from error
    return _mapping(parse(text, f"{what} {file}"), f"{what} {file}")


def read_inline(value: object, base: Path | None = None, what: str = "") -> dict[str, object]:
    """A mapping given as such, as JSON text, or as ``@file`` (JSON, TOML or YAML by its suffix).

    Args:
        value: the mapping, or text.
        base: the directory that a relative ``@file`` starts from; the working directory if None.
        what: start of the messages: the name of the setting and a space.

    Raises:
        ConfigError: the text is not JSON, or the file cannot be used. The message never quotes
            the text, which may hold passwords.
    """
    if isinstance(value, str) and value.startswith("@"):
        return read_file((base or Path()) / Path(value[1:]).expanduser(), f"{what}file")
    if isinstance(value, str):
        value = _parse_json(value, f"{what}text")
    return _mapping(value, f"{what}value")


def _mapping(value: object, what: str) -> dict[str, object]:
    if value is None:  # an empty YAML file
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{what}: expected a mapping of names to values, got {type(value).__name__}"
        )
    bad = [key for key in value if not isinstance(key, str)]
    if bad:
        raise ConfigError(f"{what}: names must be text, but {bad[0]!r} is {type(bad[0]).__name__}")
    return dict(value)


def _parse_json(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(
            f"{what} is not valid JSON: {error.msg} ({where});"
            ' expected an object like \'{"path": "/data"}\', or @file'
        ) from None  # the cause would carry the text itself


def _parse_toml(text: str, what: str) -> object:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{what} is not valid TOML: {error}") from None


def _parse_yaml(text: str, what: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{what} is not valid YAML: {error.problem}{where}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from None


_PARSERS: dict[str, Callable[[str, str], object]] = {
    ".json": _parse_json,
    ".toml": _parse_toml,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
}
