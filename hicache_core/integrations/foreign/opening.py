"""Opens a backend for an engine: backend, seal, guard, chain and worker, without a host pool."""

from __future__ import annotations

import time
from collections.abc import Mapping

from hicache_core.build.storage import Composed, composed
from hicache_core.errors import ConfigError
from hicache_core.integrations.foreign.calls import Calls, DirectCalls, StagedCalls
from hicache_core.integrations.foreign.staging import StagingAreas, room_for
from hicache_core.integrations.foreign.store import ForeignStore, Watch
from hicache_core.observe.stores import backend_statuses, rejected_pages
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.sealed import HEADER_NBYTES
from hicache_core.storage.workers.worker import OnResult, StorageWorker
from hicache_core.types import BackendContext

STAGING_NBYTES = 64 << 20
MAX_NBYTES = 1 << 30
"""Bytes of reads that run at once, and of writes that wait or run."""


def open_store(  # noqa: PLR0913 - what an engine says once, each by name
    name: str,
    settings: Mapping[str, object],
    *,
    object_nbytes: int = 0,
    rank: int = 0,
    world_size: int = 1,
    is_writer: bool = True,
    n_threads: int = 4,
    across_processes: bool = False,
    staging_nbytes: int = STAGING_NBYTES,
) -> ForeignStore:
    """Opens a backend for one or several namespaces of an engine's pages.

    A backend that bounds its calls reads and writes the engine's memory. Any other goes through
    staging memory of ``n_threads * staging_nbytes``, which holds ``n_threads`` pages at least.

    Args:
        name: an installed plugin, ``chain`` or ``dynamic``.
        settings: the backend's own settings, and those of its guard under ``guard``.
        object_nbytes: bytes of the longest page; 0 if that is not known. Backends whose objects
            have slots of one size take it as that size.
        rank: this process among those that share the engine's cache.
        world_size: how many processes share it.
        is_writer: whether this process stores: of those that hold the same bytes, one does.
        n_threads: how many background jobs run at the same time.
        across_processes: what one process stores is to be found by another. A backend that keeps
            its objects in the process is refused.
        staging_nbytes: bytes of staging memory for each thread.

    Raises:
        PluginError: the backend is not installed, does not load, or is not a backend.
        ConfigError: a setting is wrong, or the backend does not reach other processes.
        BackendError: it cannot be opened.
    """
    if n_threads < 1 or staging_nbytes < 1:
        raise ConfigError(
            f"n_threads is {n_threads} and staging_nbytes {staging_nbytes}; both are at least 1"
        )
    nbytes = HEADER_NBYTES + object_nbytes if object_nbytes else 0
    context = BackendContext("", nbytes, rank, world_size)
    made = composed(name, settings, context, time.monotonic)
    if across_processes and all(seal.inner.in_process for seal in made.seals):
        raise ConfigError(
            f"backend {name!r} keeps its objects in one process, but the engine stores and reads "
            "in several; choose one that they share, such as file"
        )

    return store_on(
        made,
        object_nbytes=object_nbytes,
        is_writer=is_writer,
        n_threads=n_threads,
        staging_nbytes=staging_nbytes,
    )


def store_on(
    made: Composed,
    *,
    object_nbytes: int = 0,
    is_writer: bool = True,
    n_threads: int = 4,
    staging_nbytes: int = STAGING_NBYTES,
) -> ForeignStore:
    """Opens a composed backend as a store for an engine.

    Args:
        made: not open yet.
        object_nbytes: as for ``open_store``, like the other arguments.
        is_writer: whether this process stores.
        n_threads: how many background jobs run at the same time.
        staging_nbytes: bytes of staging memory for each thread.

    Raises:
        BackendError: the backend cannot be opened.
    """

    def make_worker(backend: StorageBackend, on_result: OnResult) -> StorageWorker:
        return StorageWorker(
            backend,
            n_threads=n_threads,
            max_read_nbytes=MAX_NBYTES,
            max_write_nbytes=MAX_NBYTES,
            clock=time.monotonic,
            deadline=made.deadlines,
            on_result=on_result,
        )

    made.backend.open()
    try:
        staging: StagingAreas | None = None
        calls: Calls
        if made.backend.bounds_calls():
            calls = DirectCalls(made.backend, make_worker)
        else:
            nbytes = n_threads * max(staging_nbytes, room_for(object_nbytes))
            staging = StagingAreas.of(made.backend, nbytes)
            calls = StagedCalls(made.backend, make_worker, staging, made.deadlines)
    except BaseException:
        made.backend.close()
        raise
    watch = Watch(
        statuses=lambda: backend_statuses(made.guards),
        rejected=lambda: rejected_pages(made.seals),
        verdict=made.verdict,
    )
    return ForeignStore(made.backend, calls, watch, staging=staging, is_writer=is_writer)
