"""The registered host pools and the store that their pages go to."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch

from hicache_core.integrations.foreign.namespace import ForeignNamespace
from hicache_core.integrations.foreign.store import ForeignStore
from hicache_core.integrations.sglang.pools import PoolPages
from hicache_core.integrations.sglang.traffic import Traffic
from hicache_core.process.logs import log_once
from hicache_core.types import Page

_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS_A_QUESTION = 512
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Pool:
    """A registered host pool.

    Attributes:
        pages: of the pool.
        prefix: of its keys: the digest of its namespace, and a slash.
        stores: whether this rank stores its pages.
    """

    pages: PoolPages
    prefix: str
    stores: bool

    def keys(self, keys: Sequence[str]) -> list[str]:
        """Returns our names of SGLang's keys: page hashes go in as they are."""
        return [
            f"{self.prefix}{key if _SHA256.fullmatch(key) else sha256(key.encode()).hexdigest()}"
            for key in keys
        ]


class PoolStore:
    """Reads and writes pages of several host pools, each under a namespace of its own.

    No method but ``add`` raises: what cannot be read is a miss, and what was not stored is answered
    with False.

    Threads: all methods but ``add`` may be called from any thread, several at the same time.
    """

    def __init__(self, store: ForeignStore, traffic: Traffic) -> None:
        """Has no pool yet.

        Args:
            store: open; closed by ``close``.
            traffic: is told what was read and written.
        """
        self._store = store
        self._traffic = traffic
        self._pools: dict[str, _Pool] = {}

    def add(
        self, name: str, pages: PoolPages, namespace: ForeignNamespace, *, stores: bool
    ) -> None:
        """Registers a host pool.

        Args:
            name: of the pool.
            pages: of the pool.
            namespace: of its keys.
            stores: whether this rank stores its pages; if not, every write answers yes at once.
        """
        self._store.register_memory(pages.buffers)
        prefix = f"{self._store.describe(namespace)}/"
        self._pools[name] = _Pool(pages, prefix, stores)

    def pages(self, name: str) -> PoolPages | None:
        """Returns the pages of a pool; None if it is not registered, or the store is closed."""
        pool = self._pools.get(name)
        return None if pool is None else pool.pages

    def present(self, name: str, keys: Sequence[str]) -> list[bool]:
        """Returns for each key whether its page is stored."""
        pool = self._pools.get(name)
        if pool is None:
            return [False] * len(keys)
        return list(self._store.exists(pool.keys(keys)).mask)

    def n_leading(self, name: str, keys: Sequence[str]) -> int:
        """Returns how many leading pages are stored; ``keys`` may be those of a whole prompt."""
        for start in range(0, len(keys), _KEYS_A_QUESTION):
            present = self.present(name, keys[start : start + _KEYS_A_QUESTION])
            if False in present:
                return start + present.index(False)
        return len(keys)

    def load(self, name: str, keys: Sequence[str], indices: torch.Tensor | None) -> list[bool]:
        """Reads pages into a pool.

        Args:
            name: of the pool.
            keys: SGLang's.
            indices: slots of the pool, int64, those of a page for each key.

        Returns:
            For each key whether its page was read and verified.
        """
        pool = self._fitting(name, keys, indices)
        if pool is None or indices is None:
            return [False] * len(keys)
        slots = indices

        def run() -> Sequence[bool]:
            return pool.pages.read(slots, lambda pages: self._read(pool, keys, pages))

        return _safely(len(keys), run)

    def save(self, name: str, keys: Sequence[str], indices: torch.Tensor | None) -> list[bool]:
        """Stores pages of a pool, except those that are stored already.

        Args:
            name: of the pool.
            keys: SGLang's.
            indices: slots of the pool, int64, those of a page for each key.

        Returns:
            For each key whether its page is stored.
        """
        pool = self._fitting(name, keys, indices)
        if pool is None or indices is None:
            return [False] * len(keys)
        if not pool.stores:  # another rank does
            return [True] * len(keys)
        slots = indices

        def pages_at(places: Sequence[int]) -> Sequence[Page]:
            if len(places) == len(keys):
                return pool.pages.sources(slots)
            return pool.pages.sources(slots.view(len(keys), -1)[list(places)].flatten())

        return _safely(len(keys), lambda: self._write(pool, keys, pages_at))

    def load_tensors(
        self, name: str, keys: Sequence[str], targets: Sequence[torch.Tensor]
    ) -> list[bool]:
        """Reads pages into tensors.

        Args:
            name: of the pool.
            keys: SGLang's.
            targets: contiguous; filled in the order of the pool's ``get_data_page``.

        Returns:
            For each key whether its page was read and verified.
        """
        pool = self._pools.get(name)
        if pool is None:
            return [False] * len(keys)
        return _safely(len(keys), lambda: self._read(pool, keys, pool.pages.flat(targets)))

    def save_tensors(
        self, name: str, keys: Sequence[str], values: Sequence[torch.Tensor]
    ) -> list[bool]:
        """Stores pages that are tensors, except those that are stored already.

        Args:
            name: of the pool.
            keys: SGLang's.
            values: in the order of the pool's ``get_data_page``.

        Returns:
            For each key whether its page is stored.
        """
        pool = self._pools.get(name)
        if pool is None:
            return [False] * len(keys)
        if not pool.stores:
            return [True] * len(keys)

        def pages_at(places: Sequence[int]) -> Sequence[Page]:
            return pool.pages.flat([values[n].contiguous() for n in places])

        return _safely(len(keys), lambda: self._write(pool, keys, pages_at))

    def clear(self) -> bool:
        """Removes the pages of the registered pools from the store, and no others.

        Returns:
            Whether the store could.
        """
        try:
            for pool in self._pools.values():
                self._store.clear(pool.prefix)
        except Exception as error:  # SGLang's scheduler asks, and goes on whatever happens here
            _logger.error("the store was not cleared: %s", error)
            return False
        return True

    def close(self) -> None:
        """Closes the store; every question is a miss from then on."""
        self._pools = {}
        self._store.close()

    def _fitting(
        self, name: str, keys: Sequence[str], indices: torch.Tensor | None
    ) -> _Pool | None:
        """Returns the pool if ``indices`` are slots of it, those of a page for each key."""
        pool = self._pools.get(name)
        if pool is None:
            log_once(_logger, logging.ERROR, f"no open host pool {name!s}: its pages are misses")
            return None
        n_slots = 0 if indices is None else indices.numel()
        if n_slots != len(keys) * pool.pages.n_tokens:
            log_once(
                _logger,
                logging.ERROR,
                f"pool {name!s}: got {n_slots} slots for {len(keys)} pages of"
                f" {pool.pages.n_tokens} slots: misses",
            )
            return None
        return pool

    def _read(self, pool: _Pool, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        answer = self._store.read(pool.keys(keys), pages)
        self._traffic.read(sum(answer.mask), pool.pages.nbytes, answer.elapsed_s)
        return answer.mask

    def _write(
        self, pool: _Pool, keys: Sequence[str], pages_at: Callable[[Sequence[int]], Sequence[Page]]
    ) -> Sequence[bool]:
        """Stores the pages that are not stored yet; ``pages_at`` returns those at some places."""
        names = pool.keys(keys)
        asked = self._store.exists(names)
        missing = [n for n, there in enumerate(asked.mask) if not there]
        if asked.error or not missing:  # a store that cannot answer is not asked twice
            return asked.mask
        answer = self._store.write([names[n] for n in missing], pages_at(missing))
        self._traffic.written(sum(answer.mask), pool.pages.nbytes, answer.elapsed_s)
        stored = dict(zip(missing, answer.mask, strict=True))
        return [stored.get(n, True) for n in range(len(keys))]


def _safely(n_keys: int, run: Callable[[], Sequence[bool]]) -> list[bool]:
    """Returns what ``run`` returns; all False, and a line in the log, if it raises."""
    try:
        return list(run())
    except Exception as error:  # whatever a host pool raises is a miss: SGLang goes on
        _logger.exception("%d pages are a miss: %s", n_keys, error)
        return [False] * n_keys
