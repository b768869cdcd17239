"""What the JSON of ``--hicache-storage-backend-extra-config`` says, and which SGLang it is for."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hicache_core.config.messages import config_error
from hicache_core.errors import ConfigError
from hicache_core.integrations.foreign.settings import BackendSettings, release_of

OLDEST, NEWEST = (0, 5, 22), (0, 5, 23)
_WHAT = "hicache_storage_backend_extra_config."


class SGLangSettings(BaseModel):
    """The keys of the JSON; those that SGLang takes out itself do not arrive here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    backend_name: str = "hicache"
    module_path: str = ""
    class_name: str = ""
    interface_v1: bool = False
    backend: str = Field(
        min_length=1, description='the name of an installed backend, such as "file" or "redis"'
    )
    backend_config: BackendSettings = Field(default_factory=dict)
    variant: str = ""
    allow_untested_version: bool = False

    @field_validator("interface_v1", mode="before")
    @classmethod
    def _number_or_bool(cls, value: object) -> object:
        return bool(value) if value in (0, 1) else value


def read_settings(extra_config: Mapping[str, object] | None) -> SGLangSettings:
    """Returns the settings in SGLang's extra config.

    Raises:
        ConfigError: a key is unknown, missing or wrong.
    """
    try:
        return SGLangSettings(**(extra_config or {}))  # type: ignore[arg-type]  # this is the check
    except ValidationError as error:
        raise config_error(error, SGLangSettings, prefix=_WHAT) from None


def check_version(version: str, *, allow_untested: bool) -> None:
    """Refuses an SGLang that this adapter was not tested with.

    Args:
        version: SGLang's own, such as ``0.5.23`` or ``0.5.23.post1``.
        allow_untested: take any version.

    Raises:
        ConfigError: the version is out of range and ``allow_untested`` is false.
    """
    if allow_untested or OLDEST <= release_of(version) <= NEWEST:
        return
    oldest, newest = (".".join(map(str, limit)) for limit in (OLDEST, NEWEST))
    raise ConfigError(
        f"SGLang is {version}, and this adapter was tested with {oldest} to {newest};"
        ' install one of these, or set "allow_untested_version": true in the extra config'
    )
