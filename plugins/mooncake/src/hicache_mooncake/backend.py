"""Pages in a Mooncake store, moved directly between registered host memory and the store."""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar, TypeVar

from hicache_core.errors import BackendFull, IntegrityError
from hicache_core.plugin.backends import n_leading, nbytes_of
from hicache_core.storage.base import (
    BackendConfig,
    Buffer,
    Finding,
    StorageBackend,
    namespace_of,
)
from hicache_core.types import BackendContext, Page
from hicache_mooncake.admin import Admin
from hicache_mooncake.client import Client, Store
from hicache_mooncake.config import MooncakeConfig
from hicache_mooncake.diagnose import diagnose
from hicache_mooncake.errors import (
    ALREADY_EXISTS,
    DROPS,
    INVALID_PARAMS,
    MISSES,
    NOT_READY,
    OBJECT_NOT_FOUND,
    OK,
)
from hicache_mooncake.memory import Batch, RegisteredMemory, SliceGate, Slices, address_of, runs
from hicache_mooncake.staging import Staging, may_be_empty
from hicache_mooncake.writers import unsettled

logger = logging.getLogger(__name__)

T = TypeVar("T")
Move = Callable[[Store, Sequence[str], Sequence[T]], list[int]]
"""Moves a batch of pages, or of their slices in registered memory; Mooncake's code for each."""

MAX_SLICES = 1024
"""Maximum number of slices in flight: the default queue of the tcp transport for one peer."""


class MooncakeBackend(StorageBackend):
    """Immutable objects in the pooled memory of the servers that share a ``mooncake_master``.

    Memory announced with ``register_memory`` is read and written in place. Other memory is copied
    through one registered buffer, or refused (``require_registered``).
    """

    name: ClassVar[str] = "mooncake"
    pins_last: ClassVar[bool] = True
    Config: ClassVar[type[BackendConfig]] = MooncakeConfig

    def __init__(self, config: MooncakeConfig, context: BackendContext) -> None:
        super().__init__(config, context)
        self.settings = config
        self.client = Client(config)
        self._admin = Admin(config)
        self._memory = RegisteredMemory()
        self._staging = Staging(config.staging_nbytes, self.client.register, self.client.unregister)
        self._gate = SliceGate(MAX_SLICES)
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        self._is_open = False

    def check_reachable(self) -> None:
        self.client.check_reachable()

    def open(self) -> None:
        if not self._is_open:
            self.client.open()
            self._counts.clear()
            self._is_open = True

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self.client.close(self._release_memory)

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        """Announces the memory of all pages; called by the owner, before any page.

        Raises:
            BackendError: the transport refused a buffer.
            IntegrityError: two buffers overlap.
        """
        with self.client.using():
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                if not view.nbytes:
                    continue
                self._memory.check_apart(view)
                self.client.register(address_of(view), view.nbytes)
                self._memory.add(view)

    def get(self, key: str) -> Buffer | None:
        with self.client.using() as store:
            value = self._staging.fetch(store, key)
        if isinstance(value, int):
            self._missed(value, f"get of {key}")
            return None
        return value

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def set(self, key: str, value: Buffer) -> None:
        with self.client.using() as store:
            page = (memoryview(value).cast("B"),)
            codes = self._after_others(self._stage)(store, [key], [page])
            if not self._stored(codes, [page[0].nbytes])[0]:
                raise BackendFull(
                    f"mooncake dropped {key} (code {codes[0]}, {DROPS[codes[0]]}); without room, "
                    "lend more memory (global_segment_size) or start more servers; what is not "
                    "ready is being written by another process, or was by one that died"
                )

    def delete(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        with self.client.using() as store:
            for code in store.batch_remove(list(keys), True):
                if code < 0 and code != OBJECT_NOT_FOUND and code not in DROPS:
                    raise self.client.error(code, "delete")

    def batch_exists(self, keys: Sequence[str]) -> int:
        if not keys:
            return 0
        with self.client.using() as store:
            codes = store.batch_is_exist(list(keys))
        for n, code in enumerate(codes):
            if code != 1:
                if code < 0 and code not in MISSES:
                    raise self.client.error(code, "exists")
                return n
        return len(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return n_leading(self._read(keys, pages, leading=True))

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return n_leading(self._write(keys, pages, leading=True))

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        if not keys:
            return []
        with self.client.using() as store:
            codes = store.batch_is_exist(list(keys))
        for code in codes:
            if code < 0 and code not in MISSES:
                raise self.client.error(code, "exists")
        return [code == 1 for code in codes]

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self._read(keys, pages, leading=False)

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self._write(keys, pages, leading=False)

    def bounds_calls(self) -> bool:
        """Returns False: Mooncake gives up on a transfer after a minute without cancelling it.

        What comes later is still written to the page.
        """
        return False

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``, leased or not; returns how many."""
        with self.client.using() as store:
            n = store.remove_by_regex(f"^{re.escape(prefix)}.*", True)
        if n < 0:
            raise self.client.error(n, f"clear of {prefix!r}")
        return n

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Returns the keys that start with ``prefix`` now, from the master's HTTP port."""
        with self.client.using():
            return self._admin.keys(prefix)

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """See ``Pins``.

        In Mooncake a pin is a property of a write, so each object is read and written again. It is
        a miss during that time.
        """
        n_pinned = 0
        for key in keys:  # one at a time, so that close() need not wait for all of them
            with self.client.using() as store:
                code = self._staging.rewrite(store, key, self.client.pinning(ttl_s))
            if code != OK and code not in MISSES and code not in DROPS:
                raise self.client.error(code, f"pin of {key}")
            n_pinned += code == OK
        return n_pinned

    def usage(self) -> Mapping[str, int]:
        """Returns bytes by namespace, one copy of each object. Slow: asks for every object."""
        usage: Counter[str] = Counter()
        for key, nbytes in self._admin.sizes(self.list_keys("")):
            usage[namespace_of(key)] += nbytes
        return usage

    def stats(self) -> Mapping[str, float]:
        """Returns misses, drops and staged pages by kind since ``open``, and memory sizes."""
        with self._counts_lock:
            counts = {name: float(n) for name, n in self._counts.items()}
        dropped = sum(counts.get(f"dropped_{kind}", 0.0) for kind in set(DROPS.values()))
        return {
            "staged_pages": 0.0,
            "staged_nbytes": 0.0,
            **counts,
            "dropped_writes": dropped,
            "registered_nbytes": float(self._memory.nbytes),
            "segment_nbytes": float(self.settings.global_segment_size),
        }

    def diagnose(self) -> Iterator[Finding]:
        """Yields findings on library, master, transport, memory and lease."""
        return diagnose(self.client, self.stats())

    # How a batch moves

    def _read(self, keys: Sequence[str], pages: Sequence[Page], *, leading: bool) -> list[bool]:
        ways = self._read_direct, self._read_staged
        return self._move(keys, pages, ways, partial(self._filled, leading=leading), leading)

    def _write(self, keys: Sequence[str], pages: Sequence[Page], *, leading: bool) -> list[bool]:
        ways = self._after_others(self._write_direct), self._after_others(self._write_staged)
        return self._move(keys, pages, ways, partial(self._stored, leading=leading), leading)

    def _move(
        self,
        keys: Sequence[str],
        pages: Sequence[Page],
        ways: tuple[Move[Slices], Move[Page]],
        judge: Callable[[Sequence[int], Sequence[int]], list[bool]],
        leading: bool,
    ) -> list[bool]:
        """Moves a batch in calls of limited size.

        Args:
            keys: one for each page.
            pages: memory of the objects.
            ways: how to move pages in registered memory, and others.
            judge: returns which pages were moved, from the codes and sizes of a call.
            leading: no call follows one in which a page failed.

        Returns:
            For each page whether it was moved.
        """
        direct, staged = ways
        if len(keys) != len(pages):
            raise ValueError(f"{len(keys)} keys do not fit {len(pages)} pages")
        with self.client.using() as store:
            layout = self._layout(pages)
            if layout is not None:
                sizes = [slices.nbytes for slices in layout]
                batch = Batch(keys, sizes, [len(slices.sizes) for slices in layout])
                limit = self.settings.max_call_nbytes
            else:
                sizes = [nbytes_of(page) for page in pages]
                batch = Batch(keys, sizes, [1] * len(pages))
                limit = self._staging.limit_nbytes
            moved: list[bool] = []
            for run in runs(batch, limit, self._gate.limit):
                with self._gate.passing(sum(batch.n_slices[run])):
                    if layout is not None:
                        codes = direct(store, keys[run], layout[run])
                    else:
                        codes = staged(store, keys[run], pages[run])
                moved += judge(codes, sizes[run])
                if leading and not all(moved):
                    break
            return moved + [False] * (len(keys) - len(moved))

    def _layout(self, pages: Sequence[Page]) -> list[Slices] | None:
        """Returns the places of the pages in registered memory; None if they must be staged.

        Raises:
            IntegrityError: a page is outside registered memory and must not be staged: RDMA would
                fail on it, and tcp would not notice.
        """
        layout: list[Slices] = []
        staged = False
        for n, page in enumerate(pages):
            slices = self._memory.slices(page)
            if slices is None:
                self._check_staging_allowed(n, len(pages))
                return None
            staged = staged or may_be_empty(slices.nbytes)
            layout.append(slices)
        return None if staged else layout

    def _check_staging_allowed(self, n: int, n_pages: int) -> None:
        required = self.settings.require_registered
        if required if required is not None else len(self._memory) > 0:
            raise IntegrityError(
                f"page {n} of {n_pages} is outside the {self._memory.nbytes} bytes of registered "
                "memory; pass every buffer with pages to register_memory()"
            )

    def _read_direct(
        self, store: Store, keys: Sequence[str], layout: Sequence[Slices]
    ) -> list[int]:
        names = list(keys)
        if all(len(slices.addresses) == 1 for slices in layout):
            return store.batch_get_into(
                names, [s.addresses[0] for s in layout], [s.nbytes for s in layout]
            )
        return store.batch_get_into_multi_buffers(
            names, [s.addresses for s in layout], [s.sizes for s in layout]
        )

    def _write_direct(
        self, store: Store, keys: Sequence[str], layout: Sequence[Slices]
    ) -> list[int]:
        names, replication = list(keys), self.client.replication
        if all(len(slices.addresses) == 1 for slices in layout):
            return store.batch_put_from(
                names, [s.addresses[0] for s in layout], [s.nbytes for s in layout], replication
            )
        return store.batch_put_from_multi_buffers(
            names, [s.addresses for s in layout], [s.sizes for s in layout], replication
        )

    def _read_staged(self, store: Store, keys: Sequence[str], pages: Sequence[Page]) -> list[int]:
        self._note_staged(pages)
        return self._staging.read(store, keys, pages)

    def _write_staged(self, store: Store, keys: Sequence[str], pages: Sequence[Page]) -> list[int]:
        self._note_staged(pages)
        return self._stage(store, keys, pages)

    def _stage(self, store: Store, keys: Sequence[str], pages: Sequence[Page]) -> list[int]:
        return self._staging.write(store, keys, pages, self.client.replication)

    def _after_others(self, write: Move[T]) -> Move[T]:
        """``write``, once no other process is still writing any of the keys, or not for a while.

        Those that another one is still writing are written too: only who begins to write the key of
        a dead process has the master give it back, once its time is over. Whether that was so is
        asked afterwards.
        """

        def write_settled(store: Store, keys: Sequence[str], pages: Sequence[T]) -> list[int]:
            waiting = unsettled(store, keys, self.settings.ready_wait_s)
            codes = write(store, keys, pages)
            if waiting:
                for n in unsettled(store, [keys[n] for n in waiting], 0.0):
                    codes[waiting[n]] = NOT_READY
            return codes

        return write_settled

    def _note_staged(self, pages: Sequence[Page]) -> None:
        with self._counts_lock:
            first = not self._counts["staged_pages"]
            self._counts["staged_pages"] += len(pages)
            self._counts["staged_nbytes"] += sum(nbytes_of(page) for page in pages)
        if first:
            logger.info(
                "mooncake copies pages through its staging buffer, since no memory is registered; "
                "register_memory() saves the copy"
            )

    # What came of it

    def _filled(self, codes: Sequence[int], sizes: Sequence[int], *, leading: bool) -> list[bool]:
        """Returns which codes are the size of their page; counts misses, if ``leading`` the first.

        Raises:
            BackendError: one that counts is a failure and not a miss.
        """
        filled = [code == size for code, size in zip(codes, sizes, strict=True)]
        missed = [code for code, is_filled in zip(codes, filled, strict=True) if not is_filled]
        for code in missed[:1] if leading else missed:
            self._missed(code if code < 0 else INVALID_PARAMS, "get")
        return filled

    def _stored(
        self, codes: Sequence[int], sizes: Sequence[int], *, leading: bool = False
    ) -> list[bool]:
        """Returns which codes mean stored; counts the other pages as dropped.

        If ``leading``, the pages behind the first one that was dropped count like it.

        Raises:
            BackendError: one that counts is a failure and not a drop.
        """
        stored = [code in (OK, ALREADY_EXISTS) for code in codes]
        dropped = [n for n, is_stored in enumerate(stored) if not is_stored]
        if dropped and leading:
            codes = [codes[dropped[0]]] * len(codes)
            dropped = list(range(dropped[0], len(codes)))
        for n in dropped:
            if codes[n] not in DROPS:
                raise self.client.error(codes[n], "set")
            self._count(f"dropped_{DROPS[codes[n]]}", 1)
            self._count("dropped_nbytes", sizes[n])
        return stored

    def _missed(self, code: int, action: str) -> None:
        """Counts a miss.

        Raises:
            BackendError: ``code`` is a failure and not a miss.
        """
        if code not in MISSES:
            raise self.client.error(code, action)
        self._count(f"misses_{MISSES[code]}", 1)

    def _count(self, name: str, n: int) -> None:
        with self._counts_lock:
            self._counts[name] += n

    def _release_memory(self) -> None:
        self._staging.release()
        for address in self._memory.addresses:
            self.client.unregister(address)
        self._memory.clear()
