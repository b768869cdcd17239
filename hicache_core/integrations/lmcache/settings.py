"""The settings of LMCache's adapter, and the versions of LMCache that it runs in."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hicache_core.config.messages import config_error
from hicache_core.errors import ConfigError
from hicache_core.integrations.foreign.settings import BackendSettings, release_of

OLDEST = (0, 5, 6)
NEWEST = (0, 5, 7)


class LMCacheSettings(BaseModel):
    """The ``adapter_params`` of the plug-in.

    ``serde`` names what the server does to chunks before it stores them, if its own ``serde``
    setting is used: LMCache does not tell an adapter, and chunks of different ones must not meet.
    ``variant`` names what else decides their bytes and is in no key of LMCache: an fp8 format,
    another rope scaling, weights that were exchanged. ``backend_config`` may also be JSON text, or
    ``@file``, which keeps passwords out of the command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    backend: str = Field(
        min_length=1, description='the name of an installed backend, such as "file" or "redis"'
    )
    backend_config: BackendSettings = Field(default_factory=dict)
    serde: str = ""
    variant: str = ""


def read_settings(params: Mapping[str, object]) -> LMCacheSettings:
    """Returns the settings in ``adapter_params``.

    Raises:
        ConfigError: a key is unknown, missing or wrong.
    """
    try:
        return LMCacheSettings.model_validate(dict(params))
    except ValidationError as error:
        raise config_error(error, LMCacheSettings, prefix="adapter_params.") from None


def check_version(version: str) -> None:
    """Refuses an LMCache whose interface this adapter was not written for.

    Args:
        version: LMCache's own, such as ``0.5.6`` or ``0.5.7rc2``.

    Raises:
        ConfigError: it is older or newer.
    """
    if not OLDEST <= release_of(version) <= NEWEST:
        oldest, newest = (".".join(map(str, limit)) for limit in (OLDEST, NEWEST))
        raise ConfigError(
            f"LMCache is {version}, and this adapter is written for {oldest} to {newest};"
            " install one of these, or another version of hicache-core"
        )
