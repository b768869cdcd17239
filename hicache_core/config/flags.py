"""Every setting of HiCacheConfig as a flag of a click command."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from hicache_core.config.messages import allowed_values
from hicache_core.config.settings import HiCacheConfig
from hicache_core.config.sources import flag_name

Command = TypeVar("Command", bound=Callable[..., Any])


class FiniteRange(click.FloatRange):
    """A range of numbers, as click's, without nan and infinity, which pass any comparison there."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        # docstring inherited
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


def config_flags(command: Command) -> Command:
    """Decorates a click command with ``--config FILE`` and a flag for each setting.

    A flag that is not given is None; pass all of them to ``load_config``. HiCacheConfig, not click,
    checks the values, so that all sources give the same messages.
    """
    for key, info in reversed(HiCacheConfig.model_fields.items()):
        text = (info.description or "").replace("`", "")
        if info.annotation is bool:
            names = f"{flag_name(key)}/--no-{flag_name(key)[2:]}"
            option = click.option(names, key, default=None, help=text)
        else:
            allowed = allowed_values(HiCacheConfig, key)
            bounds = f"{allowed}; " if allowed else ""
            help_text = f"{text} [{bounds}default {default_text(info.default)}]"
            option = click.option(
                flag_name(key), key, default=None, metavar="VALUE", help=help_text
            )
        command = option(command)
    file = click.option(
        "--config",
        "config_file",
        metavar="FILE",
        help="Read settings from a JSON, TOML or YAML file. Default: the file that HICACHE_CONFIG "
        "names.",
    )
    return file(command)


def load_config(options: Mapping[str, object]) -> HiCacheConfig:
    """The configuration from the options of a command with ``config_flags``, and the environment.

    Raises:
        ConfigError: a name or a value is wrong, or a file cannot be read.
    """
    flags = {key: value for key, value in options.items() if key in HiCacheConfig.model_fields}
    file = options.get("config_file")
    return HiCacheConfig.load(
        flags=flags, environ=os.environ, file=str(file) if file is not None else None
    )


def default_text(value: object) -> str:
    """A default as it is written in a configuration: ``none``, ``true``, ``64``."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)
