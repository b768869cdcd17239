"""Objects in a dict: three methods and a hook are all that a backend needs."""

from __future__ import annotations

from typing import ClassVar

from hicache_core.plugin import hookimpl
from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend
from hicache_core.types import BackendContext


class ExampleConfig(BackendConfig):
    """Settings of the backend ``example``."""

    max_objects: int = 1000
    password: str = ""


class ExampleBackend(StorageBackend):
    """Keeps what it is given."""

    name: ClassVar[str] = "example"
    Config: ClassVar[type[BackendConfig]] = ExampleConfig

    def __init__(self, config: BackendConfig, context: BackendContext) -> None:
        super().__init__(config, context)
        self._objects: dict[str, bytes] = {}

    def get(self, key: str) -> Buffer | None:
        return self._objects.get(key)

    def exists(self, key: str) -> bool:
        return key in self._objects

    def set(self, key: str, value: Buffer) -> None:
        self._objects[key] = bytes(value)


@hookimpl
def hicache_backends() -> list[type[StorageBackend]]:
    """The backends of this distribution."""
    return [ExampleBackend]
