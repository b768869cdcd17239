"""What a backend can do and what its tests provide; this decides which rules apply."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from importlib.util import find_spec

from hicache_core.storage.base import (
    Clearable,
    Diagnosable,
    HasStats,
    Listable,
    Pins,
    RegistersMemory,
    ReportsUsage,
    StorageBackend,
)
from hicache_core.testing.control import StoreControl
from hicache_core.testing.recipe import Recipe, Scope
from hicache_core.testing.secret_settings import secrets_in


class Feature(enum.StrEnum):
    """What some rules need in addition to the base contract; reports show the value."""

    DELETE = "delete"
    LIST = "list_keys"
    CLEAR = "clear"
    STATS = "stats"
    DIAGNOSE = "diagnose"
    REGISTER_MEMORY = "register_memory"
    PIN = "pin"
    USAGE = "usage"
    SECOND_INSTANCE = "a second instance on the same store"
    SECOND_PROCESS = "a second process on the same store"
    CONTROL = "control of the server"
    SMALL_STORE = "a store with little room"
    QUOTA = "a store with a quota for each namespace"
    TTL = "a store whose objects expire"
    SECRETS = "a secret among the settings"
    HYPOTHESIS = "the package hypothesis"


KINDS: dict[Feature, type] = {
    Feature.LIST: Listable,
    Feature.CLEAR: Clearable,
    Feature.STATS: HasStats,
    Feature.DIAGNOSE: Diagnosable,
    Feature.REGISTER_MEMORY: RegistersMemory,
    Feature.PIN: Pins,
    Feature.USAGE: ReportsUsage,
}
CAPABILITIES = frozenset([Feature.DELETE, *KINDS])
"""Features of the backend itself; its tests provide the others."""


@dataclass(frozen=True)
class Target:
    """The backend under test, and what its tests provide.

    Attributes:
        recipe: makes backends on one store.
        control: control over the server of that store, if there is one.
        small: makes backends on a store that ``KitSettings.full_nbytes`` fill, if there is one.
        quota: makes backends on a store where one namespace may take ``KitSettings.quota_nbytes``,
            and that has room for several such namespaces, if there is one.
        expiring: makes backends on a store whose objects live ``KitSettings.ttl_s``, if there is
            one.
    """

    recipe: Recipe
    control: StoreControl | None = None
    small: Recipe | None = None
    quota: Recipe | None = None
    expiring: Recipe | None = None


def detect(backend: StorageBackend, target: Target) -> frozenset[Feature]:
    """The features of an opened ``backend`` of ``target``."""
    scope = target.recipe.scope
    present = {
        Feature.DELETE: _deletes(backend),
        Feature.SECOND_INSTANCE: scope is not Scope.INSTANCE,
        Feature.SECOND_PROCESS: scope is Scope.SHARED,
        Feature.CONTROL: target.control is not None,
        Feature.SMALL_STORE: target.small is not None,
        Feature.QUOTA: target.quota is not None,
        Feature.TTL: target.expiring is not None,
        Feature.SECRETS: bool(secrets_in(target.recipe.settings)),
        Feature.HYPOTHESIS: find_spec("hypothesis") is not None,
    }
    found = {feature for feature, there in present.items() if there}
    return frozenset(
        found | {f for f, kind in KINDS.items() if backend.capability(kind) is not None}
    )


def _deletes(backend: StorageBackend) -> bool:
    """Whether ``delete`` works, found by a call that changes nothing."""
    try:
        backend.delete([])
    except NotImplementedError:
        return False
    return True
