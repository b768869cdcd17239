"""The L2 adapter of LMCache's server: its tasks become jobs of a ``ForeignStore``."""

from __future__ import annotations

import ctypes
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.platform import create_event_notifier

from hicache_core.errors import HiCacheError
from hicache_core.integrations.foreign.opening import open_store
from hicache_core.integrations.foreign.store import Answer
from hicache_core.integrations.lmcache.held import HeldChunks
from hicache_core.integrations.lmcache.layouts import (
    INDEX_NBYTES,
    ChunkNames,
    KnownLayouts,
    Layout,
    Shard,
    chunk_key,
    decode,
    encode,
    index_slot,
    layout_of,
)
from hicache_core.integrations.lmcache.models import Models
from hicache_core.integrations.lmcache.parts import submit_in_parts
from hicache_core.integrations.lmcache.settings import read_settings
from hicache_core.integrations.lmcache.tasks import FinishedTasks
from hicache_core.process.logs import ROOT, log_once
from hicache_core.types import Page

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, MemoryTags, ObjectKey
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.memory_management import MemoryObj

N_THREADS = 4

logger = logging.getLogger(__name__)


class _Chunk(NamedTuple):
    """A chunk of a store or load.

    Attributes:
        shard: of its key.
        salt: of its key.
        layout: of its buffer.
        page: its buffer.
    """

    shard: Shard
    salt: str
    layout: Layout
    page: Page


class HiCacheL2Adapter(L2AdapterInterface):  # type: ignore[misc]  # LMCache has no types here
    """Stores LMCache's chunks in a backend, with its seal and guard.

    A lookup locks nothing: a chunk that is evicted before its load is a bit that the load does not
    set, and LMCache recomputes it. So is a damaged chunk, and every chunk while the store fails.

    Usage counts the chunks that this server stored and has not found missing since, at most
    ``MAX_CHUNKS`` of them: for more, it tells LMCache that the least recently used have gone. The
    store evicts by its own rules, so no capacity is reported; ``delete`` serves quotas of a salt.

    Threads: all methods may be called from any thread, several at the same time, as LMCache's
    controllers do. None blocks, except ``delete`` and ``close``, and none raises.
    """

    def __init__(
        self, params: Mapping[str, object], l1_memory_desc: L1MemoryDesc | None = None
    ) -> None:
        """Opens the backend.

        Args:
            params: the ``adapter_params`` of the plug-in: ``LMCacheSettings``.
            l1_memory_desc: the memory in which all chunks lie.

        Raises:
            PluginError: the backend is not installed, or does not load.
            ConfigError: a setting is wrong.
            BackendError: the store cannot be opened.
        """
        super().__init__()
        settings = read_settings(params)
        init_logger(ROOT)  # our messages go where LMCache's go
        self._store = open_store(settings.backend, settings.backend_config, n_threads=N_THREADS)
        try:
            if l1_memory_desc is not None and l1_memory_desc.ptr:
                self._store.register_memory([_memory(l1_memory_desc.ptr, l1_memory_desc.size)])
        except HiCacheError:  # the server goes on if the adapter was to be added while it runs
            self._store.close()
            raise
        self._backend = settings.backend
        self._models = Models()
        self._names = ChunkNames(
            version("lmcache"), self._models.identity, settings.serde, settings.variant
        )
        self._described = lru_cache(maxsize=4096)(self._describe)
        self._layouts = KnownLayouts()
        self._held: HeldChunks[ObjectKey] = HeldChunks()
        self._ids = itertools.count()
        self._stores: FinishedTasks[Any] = FinishedTasks(create_event_notifier())
        self._lookups: FinishedTasks[Any] = FinishedTasks(create_event_notifier())
        self._loads: FinishedTasks[Any] = FinishedTasks(create_event_notifier())

    def get_store_event_fd(self) -> int:
        # docstring inherited
        return self._stores.fileno()

    def get_lookup_and_lock_event_fd(self) -> int:
        # docstring inherited
        return self._lookups.fileno()

    def get_load_event_fd(self) -> int:
        # docstring inherited
        return self._loads.fileno()

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        # docstring inherited
        task = next(self._ids)

        def start() -> None:
            chunks = self._chunks(keys, objects)
            names = [
                chunk_key(self._described(chunk.shard, chunk.salt, chunk.layout), key.chunk_hash)
                for key, chunk in zip(keys, chunks, strict=True)
            ]
            pages = [chunk.page for chunk in chunks]
            nbytes = [chunk.layout.nbytes for chunk in chunks]
            on_done = partial(self._stored, task, keys, nbytes)
            submit_in_parts(self._store.submit_write, names, pages, on_done, n_threads=N_THREADS)

        self._start(keys, start, partial(self._stores.add, task, L2StoreResult(False, 0)))
        return task

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        # docstring inherited
        return self._stores.take_all()

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        # docstring inherited
        task = next(self._ids)
        fail = partial(self._lookups.add, task, Bitmap(len(keys)))

        def start() -> None:
            hints = {
                group: layout_of(tuple(desc.shapes), tuple(desc.dtypes))
                for group, desc in group_layout_descs.items()
            }
            unknown = [s for s in set(map(_shard, keys)) if self._layouts.needs_index(s)]
            ask = partial(self._ask, task, keys, hints)
            if unknown:
                self._read_index(unknown, partial(self._run, ask, fail))
            else:
                ask()

        self._start(keys, start, fail)
        return task

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        # docstring inherited
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Does nothing: a lookup locks nothing."""

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        # docstring inherited
        task = next(self._ids)

        def start() -> None:
            chunks = self._chunks(keys, objects)
            names = [
                chunk_key(self._names.digest(chunk.shard, chunk.salt, chunk.layout), key.chunk_hash)
                for key, chunk in zip(keys, chunks, strict=True)
            ]
            pages = [chunk.page for chunk in chunks]
            on_done = partial(self._loaded, task, keys, self._held.n_additions)
            submit_in_parts(self._store.submit_read, names, pages, on_done, n_threads=N_THREADS)

        self._start(keys, start, partial(self._loads.add, task, Bitmap(len(keys))))
        return task

    def query_load_result(self, task_id: int) -> Bitmap | None:
        # docstring inherited
        return self._loads.take(task_id)

    def submit_touch(self, keys: list[ObjectKey]) -> None:
        # docstring inherited (0.5.7)
        self._held.touch(keys)
        self._notify_keys_accessed(keys)

    def delete(self, keys: list[ObjectKey]) -> None:
        # docstring inherited
        names = [
            chunk_key(self._names.digest(shard, key.cache_salt, layout), key.chunk_hash)
            for key in keys
            for shard in [_shard(key)]
            for layout in self._layouts.candidates(shard, None)
        ]
        try:
            self._store.backend.delete(names)
        except (HiCacheError, NotImplementedError) as error:
            _say(logging.WARNING, "LMCache's request to delete failed", error)
        else:
            self._forget(keys)

    def get_memory_tags(self) -> MemoryTags:
        # docstring inherited (0.5.7)
        from lmcache.v1.distributed.api import MemoryResidency, MemorySegment, MemoryTags

        return MemoryTags(MemorySegment.STORAGE, MemoryResidency.REMOTE)

    def report_status(self) -> dict[str, Any]:
        # docstring inherited
        stores = [
            {"name": store.name, "breaker": store.breaker, "last_error": store.last_error}
            for store in self._store.statuses()
        ]
        return {
            "is_healthy": all(store["breaker"] != "open" for store in stores),
            "type": type(self).__name__,
            "backend": self._backend,
            "stores": stores,
            "refused_chunks": dict(self._store.rejected()),
            "jobs_in_flight": self._store.n_in_flight,
        }

    def close(self) -> None:
        # docstring inherited
        self._models.close()
        self._store.close()
        for tasks in (self._stores, self._lookups, self._loads):
            tasks.close()

    def _start(
        self, keys: Iterable[ObjectKey], start: Callable[[], None], fail: Callable[[], None]
    ) -> None:
        """As ``_run``, in the background if the model of one of ``keys`` is new."""
        run = partial(self._run, start, fail)
        names = {key.model_name for key in keys}
        self._run(partial(self._models.run, names, run), fail)

    def _run(self, start: Callable[[], None], fail: Callable[[], None]) -> None:
        """Runs ``start``, which submits a task, and ``fail`` if that raises."""
        try:
            start()
        except Exception as error:  # LMCache would lose the task: it is answered with no
            _say(logging.ERROR, "a task of LMCache failed", error)
            fail()

    def _chunks(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> list[_Chunk]:
        """Returns the chunks of a store or load, whose layouts are known from now on."""
        chunks = []
        for key, obj in zip(keys, objects, strict=True):
            meta = obj.meta  # its shapes and dtypes are None if there is one tensor only
            shapes, dtypes = meta.shapes or [meta.shape], meta.dtypes or [meta.dtype]
            layout = layout_of(tuple(shapes), tuple(dtypes), obj.get_size())
            page = (memoryview(obj.byte_array).cast("B"),)
            chunks.append(_Chunk(_shard(key), key.cache_salt, layout, page))
            self._layouts.add_own(chunks[-1].shard, layout)
        return chunks

    def _describe(self, shard: Shard, salt: str, layout: Layout) -> str:
        """Lists a layout and explains its namespace in the store; returns the digest.

        If the store does not take the entry of the index, the next server writes it.
        """
        self._store.describe(self._names.index_namespace(shard))
        entry = encode(layout)
        if len(entry) == INDEX_NBYTES:
            key = self._names.index_keys(shard)[index_slot(layout)]
            self._store.submit_write([key], [[memoryview(bytearray(entry))]], lambda _: None)
        return self._store.describe(self._names.namespace(shard, salt, layout))

    def _read_index(self, shards: Sequence[Shard], then: Callable[[], None]) -> None:
        """Reads which layouts the store lists for ``shards``, and calls ``then``."""
        keys = [key for shard in shards for key in self._names.index_keys(shard)]
        entries = [memoryview(bytearray(INDEX_NBYTES)) for _ in keys]

        def read(answer: Answer) -> None:
            n_slots = len(keys) // len(shards)
            for n, shard in enumerate(shards):
                slots = slice(n * n_slots, (n + 1) * n_slots)
                found = itertools.compress(entries[slots], answer.mask[slots])
                if not answer.error:
                    self._layouts.add_listed(shard, filter(None, map(decode, found)))
            then()

        self._store.submit_read(keys, [[entry] for entry in entries], read)

    def _ask(self, task: int, keys: Sequence[ObjectKey], hints: Mapping[int, Layout]) -> None:
        """Asks which chunks the store has, in any layout that they may have."""
        names, of_key = [], []
        digests: dict[tuple[Shard, str], list[str]] = {}
        for n, key in enumerate(keys):
            place = shard, salt = _shard(key), key.cache_salt
            if place not in digests:
                layouts = self._layouts.candidates(shard, hints.get(key.object_group_id))
                digests[place] = [self._names.digest(shard, salt, one) for one in layouts]
            for digest in digests[place]:
                names.append(chunk_key(digest, key.chunk_hash))
                of_key.append(n)
        on_done = partial(self._found, task, keys, of_key, self._held.n_additions)
        self._store.submit_exists(names, on_done)

    def _stored(
        self, task: int, keys: Sequence[ObjectKey], nbytes: Sequence[int], answer: Answer
    ) -> None:
        stored = {key: n for key, n, yes in zip(keys, nbytes, answer.mask, strict=True) if yes}
        try:
            added, forgotten = self._held.add(stored)
            if stored:
                self._notify_keys_stored(list(stored), added)
            if forgotten:
                self._notify_keys_deleted(list(forgotten), list(forgotten.values()))
        finally:
            result = L2StoreResult(all(answer.mask), sum(stored.values()))
            self._stores.add(task, result)

    def _found(
        self,
        task: int,
        keys: Sequence[ObjectKey],
        of_key: Sequence[int],
        n_additions: int,
        answer: Answer,
    ) -> None:
        present = set(itertools.compress(of_key, answer.mask))
        try:
            if not answer.error:
                self._forget((key for n, key in enumerate(keys) if n not in present), n_additions)
        finally:
            self._lookups.add(task, _bitmap(len(keys), present))

    def _loaded(
        self, task: int, keys: Sequence[ObjectKey], n_additions: int, answer: Answer
    ) -> None:
        try:
            loaded = list(itertools.compress(keys, answer.mask))
            if loaded:
                self._held.touch(loaded)
                self._notify_keys_accessed(loaded)
            if not answer.error:
                missed = itertools.compress(keys, [not yes for yes in answer.mask])
                self._forget(missed, n_additions)
        finally:
            self._loads.add(
                task, _bitmap(len(keys), itertools.compress(range(len(keys)), answer.mask))
            )

    def _forget(self, keys: Iterable[ObjectKey], n_additions: int | None = None) -> None:
        """Tells LMCache which of ``keys`` this server stored and the store has no more.

        Args:
            keys: not in the store.
            n_additions: as of ``HeldChunks.remove``.
        """
        gone = self._held.remove(keys, n_additions)
        if gone:
            self._notify_keys_deleted(list(gone), list(gone.values()))


def _shard(key: ObjectKey) -> Shard:
    return Shard(key.model_name, key.kv_rank, key.object_group_id)


def _bitmap(n: int, places: Iterable[int]) -> Bitmap:
    bitmap = Bitmap(n)
    bitmap.batched_set(list(places))
    return bitmap


def _say(level: int, what: str, error: Exception) -> None:
    """Logs each kind of error once, and what it says at DEBUG: that may differ each time."""
    kind = type(error).__name__
    log_once(logger, level, f"{what}: {kind}; the level DEBUG shows what it says, each time")
    logger.debug("%s: %s: %s", what, kind, error)


def _memory(pointer: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_uint8 * nbytes).from_address(pointer)).cast("B")
