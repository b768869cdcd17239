"""The connector's half in a worker: reads pages ahead, copies them into blocks, stores blocks."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping

from hicache_core.integrations.foreign.store import Answer, ForeignStore
from hicache_core.integrations.vllm.blocks import Blocks, HostPages
from hicache_core.integrations.vllm.fetches import Fetches
from hicache_core.integrations.vllm.keys import block_keys
from hicache_core.integrations.vllm.plans import Save, Step
from hicache_core.process.logs import log_once

logger = logging.getLogger(__name__)


class PageMover:
    """Does what the scheduler planned for each step.

    Nothing waits for the store. Blocks are copied out before their step ends, so vLLM may give them
    to another request at once; the copies are stored in the background. Saves that find no room
    or no memory for their copies are dropped and counted.

    Threads: the worker's. Threads of the store only give room back and count.
    """

    def __init__(
        self, store: ForeignStore, namespace: str, blocks: Blocks, max_nbytes: int
    ) -> None:
        """Moves nothing yet.

        Args:
            store: open, and closed by this object.
            namespace: digest that begins every key.
            blocks: the worker's KV cache.
            max_nbytes: host memory for pages on their way, in each direction.
        """
        max_pages = max(1, max_nbytes // blocks.page_nbytes)
        self._store = store
        self._namespace = namespace
        self._blocks = blocks
        self._fetches: Fetches[HostPages] = Fetches(
            store, blocks.allocate, max_pages=max_pages, clock=time.monotonic
        )
        self._lock = threading.Lock()
        self._n_free = max_pages  # for saves
        self._counts = Counter[str]()
        self._refused = Counter[str]()  # as last reported

    def before_compute(self, step: Step) -> None:
        """Starts and drops fetches, and copies fetched pages into their blocks.

        Their memory was allocated when they were fetched. On a CPU the copy needs no more; on a GPU
        it needs room for a layer's part of a few blocks.

        Raises:
            RuntimeError: the GPU has no memory left. vLLM was promised these blocks, so its step
                fails; none is computed with wrong KV.
        """
        for fetch_id, hashes in step.fetches:
            self._fetches.start(fetch_id, block_keys(self._namespace, hashes))
        for load in step.loads:
            pages = self._fetches.take(load.fetch_id)
            self._blocks.copy_in(pages, load.skip, load.block_ids)
            self._count("loaded", len(load.block_ids))
        for fetch_id in step.drops:
            self._fetches.drop(fetch_id)

    def after_compute(self, step: Step) -> None:
        """Copies full blocks out, and stores the copies in the background."""
        for save in step.saves:
            self._save(save)

    def take_reports(self) -> dict[int, int]:
        """Returns, for each fetch that ended, how many leading pages were verified."""
        return self._fetches.take_reports()

    def take_counts(self) -> Mapping[str, int]:
        """Returns how many blocks were moved since the last call, by what became of them.

        They are ``loaded``, ``stored`` or ``dropped``, or of a kind that the store's seal refuses.
        """
        refused = Counter(self._store.rejected())
        with self._lock:
            counts, self._counts = self._counts, Counter()
        counts += refused - self._refused
        self._refused = refused
        return counts

    def stores_available(self) -> Mapping[str, int]:
        """Returns for each store 1, or 0 while its circuit breaker is open."""
        return {store.name: int(store.breaker != "open") for store in self._store.statuses()}

    def close(self) -> None:
        """Closes the store."""
        self._store.close()

    def _save(self, save: Save) -> None:
        n_pages = self._take_room(len(save.block_ids))
        if n_pages == 0:
            return
        try:
            host = self._blocks.copy_out(save.block_ids[:n_pages])
        except (MemoryError, RuntimeError) as error:  # torch raises the second
            log_once(logger, logging.WARNING, "HiCache drops blocks: no memory for their copies")
            logger.debug("no memory to copy %d blocks: %s", n_pages, error)
            self._end_save(n_pages, n_stored=0)
            return
        keys = block_keys(self._namespace, save.hashes[:n_pages])
        self._store.submit_write(keys, host.pages, self._stored)

    def _take_room(self, n_wanted: int) -> int:
        with self._lock:
            n_pages = min(n_wanted, self._n_free)
            self._n_free -= n_pages
            self._counts["dropped"] += n_wanted - n_pages
        return n_pages

    def _stored(self, answer: Answer) -> None:
        """Called on threads of the store."""
        self._end_save(len(answer.mask), sum(answer.mask))

    def _end_save(self, n_pages: int, n_stored: int) -> None:
        with self._lock:
            self._n_free += n_pages
            self._counts["stored"] += n_stored
            self._counts["dropped"] += n_pages - n_stored

    def _count(self, what: str, n_blocks: int) -> None:
        with self._lock:
            self._counts[what] += n_blocks
