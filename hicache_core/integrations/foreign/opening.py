"""Opens a backend for an engine: backend, seal, guard, chain and worker, without a host pool."""

from __future__ import annotations

import time
from collections.abc import Mapping

from hicache_core.build.storage import composed
from hicache_core.integrations.foreign.store import ForeignStore
from hicache_core.observe.stores import backend_statuses, rejected_pages
from hicache_core.storage.sealed import HEADER_NBYTES
from hicache_core.storage.workers.worker import StorageWorker
from hicache_core.types import BackendContext


def open_store(
    name: str,
    settings: Mapping[str, object],
    *,
    object_nbytes: int = 0,
    rank: int = 0,
    world_size: int = 1,
    is_writer: bool = True,
    n_threads: int = 4,
) -> ForeignStore:
    """Opens a backend for one or several namespaces of an engine's pages.

    Args:
        name: an installed plugin, ``chain`` or ``dynamic``.
        settings: the backend's own settings, and those of its guard under ``guard``.
        object_nbytes: bytes of every page; 0 if several sizes go through this store.
        rank: this process among those that share the engine's cache.
        world_size: how many processes share it.
        is_writer: whether this process stores: of those that hold the same bytes, one does.
        n_threads: how many background jobs run at the same time.

    Raises:
        PluginError: the backend is not installed, does not load, or is not a backend.
        ConfigError: a setting is wrong.
        BackendError: it cannot be opened.
    """
    nbytes = HEADER_NBYTES + object_nbytes if object_nbytes else 0
    context = BackendContext("", nbytes, rank, world_size)
    made = composed(name, settings, context, time.monotonic)
    made.backend.open()
    worker = StorageWorker(
        made.backend,
        n_threads=n_threads,
        max_read_nbytes=1 << 30,
        max_write_nbytes=1 << 30,
        clock=time.monotonic,
        deadline=made.deadlines,
    )
    return ForeignStore(
        made.backend,
        worker,
        statuses=lambda: backend_statuses(made.guards),
        rejected=lambda: rejected_pages(made.seals),
        verdict=made.verdict,
        is_writer=is_writer,
    )
