"""The calls by which storage comes, goes and is emptied while requests run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from hicache_core.controller.attachment import Attaching
from hicache_core.controller.clearing import Clearing
from hicache_core.controller.parts import Parts
from hicache_core.controller.storage_tier import StorageTier
from hicache_core.errors import ConfigError


class StorageControl(ABC):
    """The part of ``Controller`` that operators use. Owner thread; every rank calls alike."""

    _parts: Parts

    def attach_storage(self, name: str, settings: Mapping[str, object]) -> Attaching:
        """Opens a storage backend while requests run, and takes it in place of the present one.

        Returns at once; ``poll`` attaches the backend when it is open on all ranks. The one before
        is drained and closed. A backend that cannot be used leaves everything as it is.

        Args:
            name: an installed plugin, ``chain`` or ``dynamic``.
            settings: the backend's own.

        Returns:
            What tells whether it is ``done``, and its ``error``.

        Raises:
            ConfigError: this cache has no host tier.
        """
        self._check_open()
        return self._storage_tier().attach(name, settings)

    def detach_storage(self) -> None:
        """Goes on without storage; what was accepted is still written, then the backend is closed.

        Raises:
            ConfigError: this cache has no host tier.
        """
        self._check_open()
        self._storage_tier().detach()

    @property
    def storage_name(self) -> str | None:
        """The attached backend; None without one."""
        storage = self._parts.storage
        return None if storage is None or storage.current is None else storage.current.name

    def _storage_tier(self) -> StorageTier:
        if self._parts.storage is None:
            raise ConfigError("storage needs enable_hierarchical_cache: true")
        return self._parts.storage

    def clear_storage(self) -> Clearing:
        """Removes from the store what this cache, on all its ranks, has put there.

        Returns at once. What is stored meanwhile may stay; from the end on, pages count as not
        stored, and are offered again at their next use.

        Returns:
            What tells whether it is ``done``, the ``n_objects`` removed, and its ``error``.

        Raises:
            ConfigError: there is no backend, or it cannot be cleared.
        """
        self._check_open()
        return self._storage_tier().clear()

    @abstractmethod
    def _check_open(self) -> None:
        """Raises UseAfterClose after ``close``, and WrongThread for all but the owner."""
