"""The stores behind the engines: each a real server or folder, and what adapters are told of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hicache_core.build.backends import backend_from
from hicache_core.storage.base import Listable, StorageBackend, namespace_of
from hicache_core.storage.manifest import manifest_key
from hicache_core.storage.scrub import GOOD, classify
from hicache_core.types import BackendContext
from tests.pd.stores import store as started
from tests.servers.valkey import Valkey

HAZARDS = ("kill", "freeze")


@dataclass(frozen=True)
class Store:
    """A store that engines are told of.

    Attributes:
        backend: the name of its backend.
        settings: that backend's own settings.
        server: Valkey's process, else None.
    """

    backend: str
    settings: dict[str, Any]
    server: Valkey | None

    @property
    def named(self) -> dict[str, Any]:
        """How each adapter is told of it."""
        return {"backend": self.backend, "backend_config": self.settings}

    @property
    def recovering(self) -> dict[str, Any]:
        """As ``named``, with a breaker that asks a lost store again after a second at most."""
        guard = {"open_s": 0.5, "max_open_s": 1.0}
        return {"backend": self.backend, "backend_config": {**self.settings, "guard": guard}}

    def bring_back(self, hazard: str) -> None:
        """Ends what one of ``HAZARDS`` did to the server; a killed one comes back empty."""
        assert self.server is not None
        if hazard == "kill":
            self.server.restart()
        else:
            self.server.thaw()

    def pages(self) -> list[str]:
        """Keys of all undamaged pages; the backend must be able to list.

        They are the longest objects: an adapter may keep short records of its own.
        """
        with self._opened() as backend:
            nbytes = _objects(backend)
        return [key for key, size in nbytes.items() if size == max(nbytes.values())]

    def damage(self, key: str) -> None:
        """Flips one bit in the last byte of a page."""
        with self._opened() as backend:
            value = backend.get(key)
            assert value is not None
            damaged = bytearray(value)
            damaged[-1] ^= 1
            backend.delete([key])  # a store may skip what it has
            backend.set(key, damaged)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[StorageBackend]:
        backend = backend_from(self.backend, self.settings, BackendContext(""))
        backend.open()
        try:
            yield backend
        finally:
            backend.close()


def _objects(backend: StorageBackend) -> dict[str, int]:
    """The length of each undamaged object but the manifests."""
    listable = backend.capability(Listable)
    assert listable is not None, f"{backend.name} cannot list"
    values = {
        key: backend.get(key)
        for key in listable.list_keys("")
        if key != manifest_key(namespace_of(key))
    }
    return {
        key: len(value)
        for key, value in values.items()
        if value is not None and classify(key, value) == GOOD
    }


@contextlib.contextmanager
def running_store(backend: str, folder: Path) -> Iterator[Store]:
    """The store of a backend for the length of a ``with``.

    Args:
        backend: its name.
        folder: gets the store's files, and does not exist yet.
    """
    folder.mkdir()
    with started(backend, folder) as (settings, server):
        yield Store(backend, settings, server)
