"""The hf3fs backend: objects in slots of slab files, bound to their keys by a metadata store.

A read looks up its keys, which leases their slots, and reads slots with headers and footers. A page
counts if it ended within the lease, has the right header, and is still bound to the same slot
afterwards. A write reserves slots, writes them, and publishes them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from hicache_core.errors import BackendError, BackendFull, BackendTimeout
from hicache_core.plugin.backends import Calls, log_once, n_leading, nbytes_of
from hicache_core.storage.base import BackendConfig, Buffer, Finding, StorageBackend
from hicache_core.types import BackendContext, Page
from hicache_hf3fs.config import Hf3fsConfig
from hicache_hf3fs.diagnose import findings
from hicache_hf3fs.metadata import Binding, SlabUnknown, Wanted, Written
from hicache_hf3fs.page_io import Transfer
from hicache_hf3fs.slab import (
    FOOTER_NBYTES,
    HEADER_NBYTES,
    MAX_KEY_NBYTES,
    slot_nbytes_for,
    translated,
)
from hicache_hf3fs.slot_transfers import SlotRead, SlotWrite, slot_content, transfer_of
from hicache_hf3fs.store import Store, open_store

logger = logging.getLogger(__name__)

_COUNTS = (
    "reads",
    "misses",
    "late_reads",
    "raced_reads",
    "damaged_slots",
    "writes",
    "dropped_writes",
    "oversized_writes",
)
_WIPE_LEASE_S = 1.0
_GONE = (-errno.EIO, -errno.ENODATA)
_FULL = (-errno.ENOSPC, -errno.EDQUOT)


class _Ask(NamedTuple):
    """A call that reads ``keys`` into ``pages``; see ``VisitsPages`` for ``arrived``."""

    keys: Sequence[str]
    pages: Sequence[Page]
    arrived: Callable[[int], bool]
    leading: bool


class _Failure(NamedTuple):
    """A slot that was not read, the result of its transfer, and whether its frame was wrong."""

    read: SlotRead
    result: int
    is_foreign: bool


class _Took(NamedTuple):
    """Which pages were filled, what failed, and how many slots were bound anew meanwhile."""

    filled: list[bool]
    failures: list[_Failure]
    n_raced: int


class _Call:
    """Yields the store to a call, and translates errors of the system. Any number may use it."""

    __slots__ = ("_calls", "_prefix")

    def __init__(self, calls: Calls[Store], prefix: Path) -> None:
        self._calls = calls
        self._prefix = prefix

    def __enter__(self) -> Store:
        return self._calls.enter()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, BackendError):
            ours = translated(error, self._prefix)
            self._calls.leave(ours)
            raise ours from error
        self._calls.leave(error)


class Hf3fsBackend(StorageBackend):
    """Slab files on 3FS (USRBIO) or on any shared file system (POSIX calls)."""

    name: ClassVar[str] = "hf3fs"
    pins_last: ClassVar[bool] = True
    Config: ClassVar[type[BackendConfig]] = Hf3fsConfig

    def __init__(self, config: Hf3fsConfig, context: BackendContext) -> None:
        super().__init__(config, context)
        self._settings = config
        self._calls: Calls[Store] = Calls(f"hf3fs backend {config.file_path_prefix}", self._opened)
        self._call = _Call(self._calls, config.file_path_prefix)
        self._counts = dict.fromkeys(_COUNTS, 0)

    @classmethod
    def taken_nbytes(cls, nbytes: int) -> int:
        """Returns the length of a slot for objects of that length."""
        return slot_nbytes_for(nbytes)

    def open(self) -> None:
        self._calls.open()

    def close(self) -> None:
        self._calls.close()

    def _opened(self) -> Store:
        with self._os_errors():
            return open_store(self._settings, self.context)

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except BackendError:
            raise
        except OSError as exc:
            raise translated(exc, self._settings.file_path_prefix) from exc

    def get(self, key: str) -> Buffer | None:
        with self._call as store:
            bound = store.metadata.lookup([key])[0]
            if bound is None:
                self._count(misses=1)
                return None
            value = bytearray(bound.nbytes)
            (is_read,) = self._get(store, [key], [[memoryview(value)]], lambda _: True)
            return value if is_read else None

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def set(self, key: str, value: Buffer) -> None:
        data = memoryview(value).cast("B")
        if self.batch_set([key], [[data]]) == 1:
            return
        with self._call as store:
            limit = store.own.object_nbytes
            if data.nbytes > limit:
                raise BackendFull(
                    f"an object of {data.nbytes} bytes does not fit a slot of {store.own.path}, "
                    f"which holds {limit}; raise slot_nbytes"
                )
            quota = self._settings.namespace_quota_nbytes
            if quota is not None and data.nbytes > quota:
                raise BackendFull(
                    f"an object of {data.nbytes} bytes is over namespace_quota_nbytes={quota}"
                )
            raise BackendFull(
                f"{store.own.path} has no slot for {data.nbytes} bytes: all are leased by readers "
                "or being written; raise file_size or lower lease_s"
            )

    def batch_exists(self, keys: Sequence[str]) -> int:
        with self._call as store:
            return store.metadata.leading(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return self.batch_get_visiting(keys, pages, lambda _: True)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return self.batch_set_visiting(keys, pages, lambda _: None)

    def batch_get_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> int:
        # docstring inherited from VisitsPages
        with self._call as store:
            return n_leading(self._get(store, keys, pages, arrived, leading=True))

    def batch_set_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> int:
        # docstring inherited from VisitsPages
        return n_leading(self._put(keys, pages, leaving, leading=True))

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        with self._call as store:
            return store.metadata.present(keys)

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self.get_each_visiting(keys, pages, lambda _: True)

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self.set_each_visiting(keys, pages, lambda _: None)

    def get_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> Sequence[bool]:
        # docstring inherited from VisitsEachPage
        with self._call as store:
            return self._get(store, keys, pages, arrived)

    def set_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> Sequence[bool]:
        # docstring inherited from VisitsEachPage
        return self._put(keys, pages, leaving)

    def bounds_calls(self) -> bool:
        """Returns False: a system call on a mount that hangs has no time limit.

        That holds in USRBIO mode too, whose files are opened and looked at by such calls.
        """
        return False

    def delete(self, keys: Sequence[str]) -> None:
        with self._call as store:
            self._delete(store, keys)

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Returns the keys that start with ``prefix`` now."""
        with self._call as store:
            return iter(list(store.metadata.keys(prefix)))

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``; returns how many there were."""
        with self._call as store:
            return self._delete(store, list(store.metadata.keys(prefix)))

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """See ``Pins``; a pin holds for all hosts that share the metadata."""
        with self._call as store:
            return store.metadata.pin(keys, ttl_s) if keys else 0

    def usage(self) -> Mapping[str, int]:
        """Returns bytes by namespace, for all ranks and hosts that share the metadata."""
        with self._call as store:
            return store.metadata.usage()

    def stats(self) -> Mapping[str, float]:
        """Returns counts since ``open``, and the slots of this rank's slab by state.

        ``held_slots`` are reserved by writers or wait for the end of a lease. ``used_nbytes``
        counts whole slots.
        """
        with self._call as store:
            totals = store.metadata.totals(store.own.name)
            return {
                "slots": totals.n_slots,
                "objects": totals.bound,
                "held_slots": totals.held,
                "used_nbytes": totals.bound * store.own.slot_nbytes,
                "max_nbytes": totals.n_slots * store.own.slot_nbytes,
                **store.io_stats(),
                **self._counts,
            }

    def diagnose(self) -> Iterator[Finding]:
        """Yields findings on mode, mount, free space, slots, other slabs and metadata."""
        with self._call as store:
            yield from findings(self._settings, store)
        if trouble := self._calls.last_trouble:
            yield Finding("warning", "store", f"{trouble}; it was reopened")

    def check_integrity(self) -> None:
        """Checks that every slot is in exactly one state.

        Raises:
            IntegrityError: the message says what is wrong.
        """
        with self._call as store:
            store.metadata.check_integrity()

    def _get(
        self,
        store: Store,
        keys: Sequence[str],
        pages: Sequence[Page],
        arrived: Callable[[int], bool],
        *,
        leading: bool = False,
    ) -> list[bool]:
        """Returns for each page whether it was read; behind a gap only if not ``leading``."""
        ask = _Ask(keys, pages, arrived, leading)
        # Measured before the question: the lease begins later, so it cannot end before this.
        deadline = time.monotonic() + self._settings.lease_s
        known = store.metadata.remembered(keys)
        found: Sequence[Binding | None] = store.metadata.lookup(keys) if known is None else known
        took = self._take(store, found, deadline, ask)
        if all(took.filled):
            self._count(reads=len(keys))
            return took.filled
        if known is not None:
            deadline = time.monotonic() + self._settings.lease_s
            found = store.metadata.lookup(keys)
            if found != known:
                took = self._take(store, found, deadline, ask)
        self._missed(store, keys, found, took, leading=leading)
        return took.filled

    def _missed(
        self,
        store: Store,
        keys: Sequence[str],
        found: Sequence[Binding | None],
        took: _Took,
        *,
        leading: bool,
    ) -> None:
        """Counts what a call has read and missed; drops the slots that cannot be read any more.

        Args:
            store: open.
            keys: of the call.
            found: the binding of each key.
            took: what was read.
            leading: whether pages behind a gap are of no use.
        """
        n_hits = n_leading(took.filled) if leading else sum(took.filled)
        self._count(
            reads=n_hits,
            misses=len(keys) - n_hits,
            raced_reads=took.n_raced,
            late_reads=sum(failure.result == -errno.ETIME for failure in took.failures),
        )
        for failure in took.failures[:1] if leading else took.failures:
            self._failed(store, keys[failure.read.position], failure)
        if n_hits < len(keys):
            for key, binding in zip(keys, found, strict=True):
                if store.is_lost(binding):
                    self._drop_damaged(store, key, binding)

    def _take(
        self, store: Store, found: Sequence[Binding | None], deadline: float, ask: _Ask
    ) -> _Took:
        """Reads the slots of bindings that were found, then asks whether they are still bound.

        Args:
            store: open.
            found: the binding of each key.
            deadline: when the leases of the slots have ended.
            ask: the call.
        """
        keys, _, arrived, _ = ask
        reads = self._readable(store, found, ask)
        foreign: set[int] = set()

        def check(n: int) -> bool:
            read = reads[n]
            if read.holds(keys[read.position]):
                return arrived(read.position)
            foreign.add(n)
            return False

        results = store.io.read([read.transfer for read in reads], deadline, check) if reads else []
        whole, failures = reads, []
        if results != [read.transfer.nbytes for read in reads]:
            whole = []
            for n, (read, result) in enumerate(zip(reads, results, strict=True)):
                if result == read.transfer.nbytes:
                    whole.append(read)
                else:
                    failures.append(_Failure(read, result, n in foreign))
        valid = store.metadata.unchanged(
            [keys[read.position] for read in whole], [read.binding for read in whole]
        )
        if len(whole) == len(keys):
            return _Took(valid, failures, valid.count(False))
        filled = [False] * len(keys)
        for read, is_valid in zip(whole, valid, strict=True):
            filled[read.position] = is_valid
        return _Took(filled, failures, valid.count(False))

    @staticmethod
    def _readable(store: Store, found: Sequence[Binding | None], ask: _Ask) -> list[SlotRead]:
        """Returns the slots that are bound, reachable, and as long as their pages.

        If the call is for leading pages, only those before the first that is not.
        """
        reads: list[SlotRead] = []
        for position, (binding, page) in enumerate(zip(found, ask.pages, strict=True)):
            if ask.leading and len(reads) < position:
                break
            if binding is None or binding.nbytes != nbytes_of(page):
                continue
            slab = store.slab(binding.slot.slab)
            if slab is None:
                continue
            header, footer = bytearray(HEADER_NBYTES), bytearray(FOOTER_NBYTES)
            buffers = [memoryview(header), *page, memoryview(footer)]
            transfer = transfer_of(slab, binding.slot.number, binding.nbytes, buffers)
            reads.append(SlotRead(position, transfer, header, footer, binding))
        return reads

    def _failed(self, store: Store, key: str, failure: _Failure) -> None:
        """Drops a slot whose content is wrong or gone; logs what else keeps it from being read.

        Args:
            store: open.
            key: of the object.
            failure: to read it.
        """
        read, result, is_foreign = failure
        if is_foreign or result >= 0 or result in _GONE:
            self._drop_damaged(store, key, read.binding)
        elif result not in (-errno.ETIME, -errno.EBADMSG):
            logger.warning("reading %s: %s", store.slab_path(read.binding), os.strerror(-result))

    def _drop_damaged(self, store: Store, key: str, binding: Binding) -> None:
        """Unbinds a slot with wrong content, so that the object can be written again."""
        n_deleted = 0
        with contextlib.suppress(BackendFull):  # it is a read: it needs no room
            n_deleted = store.metadata.delete([key], [binding.slot.generation])
        if n_deleted:
            self._count(damaged_slots=1)
            logger.warning(
                "slot %d of %s does not hold %s; dropped",
                binding.slot.number,
                store.slab_path(binding),
                key,
            )

    def _put(
        self,
        keys: Sequence[str],
        pages: Sequence[Page],
        leaving: Callable[[int], None],
        *,
        leading: bool = False,
    ) -> list[bool]:
        """Stores what fits into slots; returns for each page whether it is stored.

        If ``leading``, only the pages before the first that does not fit.
        """
        wanted = [
            Wanted(_checked(key), nbytes_of(page)) for key, page in zip(keys, pages, strict=True)
        ]
        with self._call as store:
            fits = [want.nbytes <= store.own.object_nbytes for want in wanted]
            if False in fits:
                self._say_what_fits(store)
            n_tried = n_leading(fits) if leading else len(fits)
            tried = [n for n in range(n_tried) if fits[n]]
            stored = [False] * len(keys)
            try:
                answers = self._set_with_room(
                    store,
                    [wanted[n] for n in tried],
                    [pages[n] for n in tried],
                    lambda n: leaving(tried[n]),
                )
            except BackendFull as exc:  # the metadata has no room: nothing of this call is bound
                logger.warning("%s", exc)
            else:
                for n, is_stored in zip(tried, answers, strict=True):
                    stored[n] = is_stored
            n_stored = n_leading(stored) if leading else sum(stored)
            self._count(
                writes=n_stored,
                dropped_writes=len(keys) - n_stored,
                oversized_writes=fits.count(False),
            )
            return stored

    @staticmethod
    def _say_what_fits(store: Store) -> None:
        log_once(
            logger,
            logging.WARNING,
            f"objects of more than {store.own.object_nbytes} bytes are not stored: they do not fit "
            f"a slot of {store.own.path}; raise slot_nbytes",
        )

    def _set_with_room(
        self,
        store: Store,
        wanted: Sequence[Wanted],
        pages: Sequence[Page],
        leaving: Callable[[int], None],
    ) -> list[bool]:
        """As ``_set``; on a full disk frees the log of the metadata and tries again."""
        if not wanted:
            return []
        try:
            return self._set(store, wanted, pages, leaving)
        except BackendFull:
            store.metadata.restart_log()
            return self._set(store, wanted, pages, leaving)

    def _set(
        self,
        store: Store,
        wanted: Sequence[Wanted],
        pages: Sequence[Page],
        leaving: Callable[[int], None],
    ) -> list[bool]:
        """Writes and publishes what is missing; returns for each object whether it is stored."""
        deadline = time.monotonic() + self._settings.write_lease_s
        try:
            slots = store.metadata.reserve(store.own.name, wanted)
        except SlabUnknown:  # the metadata was lost a moment ago
            store.attach()
            deadline = time.monotonic() + self._settings.write_lease_s
            slots = store.metadata.reserve(store.own.name, wanted)
        writes = [
            SlotWrite(n, Written(*wanted[n], slot), slot_content(wanted[n], slot, pages[n]))
            for n, slot in enumerate(slots)
            if slot is not None
        ]
        stored = [n < len(slots) for n in range(len(wanted))]  # there was no slot for the others
        if writes:
            published = self._write(store, writes, deadline, leaving)
            for write, is_published in zip(writes, published, strict=True):
                stored[write.position] = is_published
        return stored

    def _write(
        self,
        store: Store,
        writes: Sequence[SlotWrite],
        deadline: float,
        leaving: Callable[[int], None],
    ) -> list[bool]:
        """Writes and publishes reserved slots; returns which of them are published."""
        written = [write.written for write in writes]
        transfers = [
            transfer_of(store.own, one.slot.number, one.nbytes, write.buffers)
            for one, write in zip(written, writes, strict=True)
        ]
        try:
            results = store.io.write(transfers, deadline, lambda n: leaving(writes[n].position))
            if self._settings.fsync:
                os.fdatasync(store.own.fd)
        except BackendTimeout:
            raise  # what hangs may still be written: the slots stay reserved until their time ends
        except BaseException:
            store.metadata.release([one.slot for one in written])
            raise
        done = [r == t.nbytes for r, t in zip(results, transfers, strict=True)]
        kept = [one for one, is_done in zip(written, done, strict=True) if is_done]
        published = iter(store.metadata.publish(kept) if kept else [])
        lost = [one.slot for one, is_done in zip(written, done, strict=True) if not is_done]
        if lost:
            store.metadata.release(lost)
            _raise_unless_full(store, results, transfers)
        return [is_done and next(published) for is_done in done]

    def _delete(self, store: Store, keys: Sequence[str]) -> int:
        """Wipes the headers, so that a rebuild does not find the objects, and unbinds them."""
        lease_s = min(_WIPE_LEASE_S, self._settings.lease_s)
        deadline = time.monotonic() + lease_s
        wipes = []
        # Leased, so that no other process writes there meanwhile; briefly, since it delays reuse.
        for binding in store.metadata.lookup(keys, lease_s):
            slab = store.slab(binding.slot.slab) if binding is not None else None
            if binding is not None and slab is not None:
                offset = binding.slot.number * slab.slot_nbytes
                nothing = memoryview(bytes(HEADER_NBYTES))
                wipes.append(Transfer(slab.fd, offset, HEADER_NBYTES, [nothing]))
        if wipes:
            store.io.write(wipes, deadline, lambda _: None)
        return store.metadata.delete(keys) if keys else 0

    def _count(self, **by: int) -> None:
        with self._calls.lock:
            for name, n in by.items():
                self._counts[name] += n


def _checked(key: str) -> str:
    if not key or len(key) > MAX_KEY_NBYTES or not key.isascii():
        raise ValueError(f"{key!r} is not a key; a key has 1 to {MAX_KEY_NBYTES} ASCII characters")
    return key


def _raise_unless_full(store: Store, results: Sequence[int], transfers: Sequence[Transfer]) -> None:
    """Raises unless each failure is a full disk or an expired reservation."""
    for result, transfer in zip(results, transfers, strict=True):
        if result != transfer.nbytes and result not in (*_FULL, -errno.ETIME):
            why = os.strerror(-result) if result < 0 else f"{result} of {transfer.nbytes} bytes"
            raise BackendError(f"writing {store.own.path}: {why}; check the file system")
