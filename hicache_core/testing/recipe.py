"""How the backend under test is made, in this process and in another one."""

from __future__ import annotations

import enum
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from hicache_core.plugin import dynamic, manager
from hicache_core.storage.base import StorageBackend
from hicache_core.types import BackendContext

DYNAMIC = "dynamic"
NAMESPACE = "c0f02a9ce0000000"


class Scope(enum.StrEnum):
    """Who sees what an instance of the backend has stored."""

    INSTANCE = "instance"  # that instance only
    PROCESS = "process"  # every instance in the same process
    SHARED = "shared"  # every instance in any process: what L3 is for


@dataclass(frozen=True)
class Recipe:
    """A backend class with its settings; every backend made of it is on the same store.

    Attributes:
        backend_class: the class under test.
        settings: its own settings, as in a configuration.
        scope: who sees what it has stored.
        max_object_nbytes: bytes of the largest object; 0 for no limit. The backend gets it as
            ``context.object_nbytes``.
        asked: name and settings with which another process finds the class; empty if it cannot.
    """

    backend_class: type[StorageBackend]
    settings: Mapping[str, object] = field(default_factory=dict, repr=False)
    scope: Scope = Scope.SHARED
    max_object_nbytes: int = 0
    asked: Mapping[str, object] = field(default_factory=dict, repr=False)

    @classmethod
    def named(
        cls,
        name: str,
        settings: Mapping[str, object],
        scope: Scope = Scope.SHARED,
        max_object_nbytes: int = 0,
    ) -> Self:
        """A recipe for an installed backend, or for ``dynamic`` with settings that name a class.

        Args:
            name: of the backend.
            settings: of the backend, as in a configuration.
            scope: who sees what an instance has stored.
            max_object_nbytes: bytes of the largest object that the kit stores; 0 for no limit.

        Raises:
            PluginError: it is not installed, does not load or is not a backend.
            ConfigError: the settings of ``dynamic`` are malformed.
        """
        asked = {"name": name, "settings": dict(settings)}
        if name != DYNAMIC:
            found = manager.backend_class(name)
            return cls(found, settings, scope, max_object_nbytes, asked)
        found = dynamic.load_class(settings)
        _, own = dynamic.split_settings(settings)
        return cls(found, own, scope, max_object_nbytes, asked)

    @classmethod
    def of(
        cls,
        backend_class: type[StorageBackend],
        settings: Mapping[str, object] | None = None,
        scope: Scope = Scope.SHARED,
        max_object_nbytes: int = 0,
    ) -> Self:
        """A recipe for a class.

        Args:
            backend_class: the class; other processes find it only at the top of its module.
            settings: of the backend.
            scope: who sees what an instance has stored.
            max_object_nbytes: bytes of the largest object that the kit stores; 0 for no limit.
        """
        own = dict(settings or {})
        asked: dict[str, object] = {}
        if "." not in backend_class.__qualname__:
            where = {
                "backend_name": backend_class.name,
                "module_path": inspect.getfile(backend_class),
                "class_name": backend_class.__qualname__,
            }
            asked = {"name": DYNAMIC, "settings": own | where}
        return cls(backend_class, own, scope, max_object_nbytes, asked)

    def make(self, *, creates: bool = True) -> StorageBackend:
        """A new backend, not yet opened.

        Args:
            creates: False for a command that only reads: a missing store is not created.

        Raises:
            ConfigError: a setting is wrong.
        """
        config = manager.backend_settings(self.backend_class, self.settings)
        context = BackendContext(NAMESPACE, object_nbytes=self.max_object_nbytes, creates=creates)
        return self.backend_class(config, context)

    def to_json(self) -> str:
        """What another process needs for ``from_json``; holds the settings, secrets included."""
        return json.dumps({**self.asked, "max_object_nbytes": self.max_object_nbytes})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The recipe that ``to_json`` wrote."""
        values = json.loads(text)
        return cls.named(
            values["name"], values["settings"], max_object_nbytes=values["max_object_nbytes"]
        )
