"""A store as the source and as the target of a move."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hicache_core.errors import BackendError
from hicache_core.storage.base import (
    Buffer,
    Listable,
    RegistersMemory,
    ReportsTotals,
    StorageBackend,
)
from hicache_core.storage.manifest import manifest_key
from hicache_core.storage.moving.base import Batch, Intact, Target, wrong
from hicache_core.storage.moving.outcomes import Outcome, Result, Totals
from hicache_core.storage.moving.slab import Slab
from hicache_core.storage.moving.terms import Refuses, Said, Terms, agreed, said_in
from hicache_core.storage.scrub import GOOD, VANISHED, classify
from hicache_core.storage.visiting import VisitsEachPage

_BATCH_KEYS = 1024


@dataclass(frozen=True, slots=True)
class Part:
    """Objects of one namespace that are to be moved.

    Attributes:
        namespace: 16 hex digits.
        keys: of the objects; None for all that the store lists.
    """

    namespace: str
    keys: Sequence[str] | None = None

    def every_key(self, backend: StorageBackend) -> Iterator[str]:
        """Yields the key of the manifest first, and then the others, in any order.

        Args:
            backend: the store.

        Raises:
            BackendError: it cannot list its keys, and there are no ``keys``.
        """
        first = manifest_key(self.namespace)
        keys: Iterator[str] | Sequence[str] | None = self.keys
        if keys is None:
            listable = backend.capability(Listable)
            if listable is None:
                raise BackendError(
                    f"backend {backend.name!r} cannot list its keys (it is not Listable), so a "
                    "whole namespace cannot be read from it; name prompts instead"
                )
            keys = listable.list_keys(f"{self.namespace}/")
        if backend.exists(first):
            yield first
        yield from (key for key in keys if key != first)


def count_keys(backend: StorageBackend, parts: Sequence[Part]) -> dict[str, int]:
    """Returns the number of objects by namespace; lists the keys of the store.

    Args:
        backend: the store.
        parts: as of ``StoreReader``.
    """
    return {part.namespace: sum(1 for _ in part.every_key(backend)) for part in parts}


def count_gone(backend: StorageBackend, totals: Totals) -> int:
    """Counts objects that were copied into a store and are gone again, by what it holds now.

    A store with a limit takes every object, and evicts others for it. There may be more of them:
    objects that were there before, or that others store, are not told apart.

    Args:
        backend: the target, open.
        totals: of the move.

    Returns:
        0 if the store cannot list its keys.

    Raises:
        BackendError: the store cannot answer.
    """
    reports, lists = backend.capability(ReportsTotals), backend.capability(Listable)
    held = None if reports is None else reports.namespace_totals()
    gone = 0
    for namespace, outcomes in totals.by_namespace().items():
        copied = outcomes.get(Outcome.COPIED, {"objects": 0})["objects"]
        if copied and held is not None:
            there = held[namespace].objects if namespace in held else 0
        elif copied and lists is not None:
            there = sum(1 for _ in lists.list_keys(f"{namespace}/"))
        else:
            continue
        gone += max(0, copied - there)
    return gone


class StoreReader:
    """Reads the objects of a store, a batch at a time, and checks each seal.

    It deletes nothing: a damaged object is counted and stays.
    """

    def __init__(self, backend: StorageBackend, parts: Sequence[Part], refuses: Refuses) -> None:
        """Reads nothing yet.

        Args:
            backend: open, and not sealed.
            parts: what to read.
            refuses: says what must not be moved.
        """
        self._backend = backend
        self._visiting = backend.capability(VisitsEachPage)
        self._refuses = refuses
        self._lock = threading.Lock()
        self._parts = iter(parts)
        self._part: _Running | None = None

    def take(self, slab: Slab, target: Target) -> Batch | None:
        # docstring inherited from Source
        with self._lock:
            running, keys = self._next_keys(slab, target)
        if running is None:
            return None
        if running.terms.refused:
            why = running.terms.refused
            return Batch([], [Result(key, Outcome.REFUSED, reason=why) for key in keys])
        there = target.has(keys)
        lacking = [key for key, is_there in zip(keys, there, strict=True) if not is_there]
        batch = Batch([], [Result(key, Outcome.PRESENT) for key in itertools.compress(keys, there)])
        for one in self._read(lacking, slab, running):
            batch.take(one, running.terms)
        return batch

    def _next_keys(self, slab: Slab, target: Target) -> tuple[_Running | None, list[str]]:
        """The next keys, all of one part, and that part; None after the last part."""
        while True:
            if self._part is None:
                part = next(self._parts, None)
                if part is None:
                    return None, []
                self._part = self._begun(part, target)
            running = self._part
            n = _BATCH_KEYS
            if not running.terms.refused:
                n = max(1, min(n, slab.nbytes // running.nbytes if running.nbytes else 1))
            # Some stores list a key twice.
            if keys := list(dict.fromkeys(itertools.islice(running.keys, n))):
                return running, keys
            self._part = None

    def _begun(self, part: Part, target: Target) -> _Running:
        namespace = part.namespace
        own = said_in(self._backend, namespace)
        terms = agreed(own, target.said(namespace))
        if why := self._refuses(namespace, own.manifest):
            terms = Terms(refused=why)
        keys = part.every_key(self._backend)
        return _Running(keys, manifest_key(namespace), terms, terms.object_nbytes)

    def _read(
        self, keys: Sequence[str], slab: Slab, running: _Running
    ) -> Iterator[Intact | Result]:
        """Reads objects: those of the expected length in one call, the others one by one."""
        pages = slab.cut(running.nbytes, len(keys)) if running.nbytes else []
        kinds = self._fill(keys[: len(pages)], pages)
        for n, key in enumerate(keys):
            if n < len(pages) and kinds[n] == GOOD:
                yield Intact(key, (pages[n],))
                continue
            # Absent, of another length, or wrong: what was damaged on the way only is right now.
            value = self._backend.get(key)
            kind = classify(key, value)
            if value is None or kind == VANISHED:
                yield Result(key, Outcome.VANISHED)
                continue
            data = _writable(value)
            if kind != GOOD:
                yield wrong(key, kind, data.nbytes)
                continue
            if key != running.manifest_key:
                running.nbytes = data.nbytes
            yield Intact(key, (data,))

    def _fill(self, keys: Sequence[str], pages: Sequence[memoryview]) -> list[str]:
        """Reads objects into ``pages``; for each its kind, as of ``classify``, or VANISHED."""
        kinds = [VANISHED] * len(keys)

        def arrived(n: int) -> bool:
            kinds[n] = classify(keys[n], pages[n])
            return True

        if not keys:
            return kinds
        whole = [(page,) for page in pages]
        if self._visiting is not None:  # each is checked while the processor has it in its cache
            filled = self._visiting.get_each_visiting(keys, whole, arrived)
            return [kind if yes else VANISHED for kind, yes in zip(kinds, filled, strict=True)]
        for n, is_filled in enumerate(self._backend.get_each(keys, whole)):
            if is_filled:
                arrived(n)
        return kinds


@dataclass(slots=True)
class _Running:
    """A part that is being read.

    Attributes:
        keys: those that are left.
        manifest_key: of its namespace.
        terms: likewise.
        nbytes: the length that its next objects probably have; 0 if nothing is known.
    """

    keys: Iterator[str]
    manifest_key: str
    terms: Terms
    nbytes: int


class StoreWriter:
    """Writes objects into a store as they are: they keep the seals that were checked."""

    def __init__(self, backend: StorageBackend) -> None:
        """Takes a backend that is open, and not sealed."""
        self._backend = backend

    def said(self, namespace: str) -> Said:
        # docstring inherited from Target
        return said_in(self._backend, namespace)

    def has(self, keys: Sequence[str]) -> Sequence[bool]:
        # docstring inherited from Target
        return self._backend.exists_each(keys)

    def write(self, objects: Sequence[Intact]) -> Sequence[bool]:
        # docstring inherited from Target
        return self._backend.set_each([one.key for one in objects], [one.page for one in objects])


def register(slabs: Sequence[Slab], *backends: StorageBackend) -> None:
    """Announces the memory of ``slabs`` to those backends whose transport must know it."""
    for backend in backends:
        registers = backend.capability(RegistersMemory)
        if registers is not None:
            registers.register_memory([slab.memory for slab in slabs])


def _writable(value: Buffer) -> memoryview:
    """The object as a page may have it."""
    data = memoryview(value).cast("B")
    return memoryview(bytearray(data)) if data.readonly else data
