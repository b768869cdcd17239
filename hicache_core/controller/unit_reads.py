"""Units that a prefetch asks storage for: which boundary they make usable, and their reads."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from hicache_core.controller.attachment import Attachment
from hicache_core.controller.groups import GroupPaths
from hicache_core.controller.parts import GroupParts, Parts
from hicache_core.controller.prefetch_record import UnitRead, UnitReads
from hicache_core.controller.storage_tier import Judge, StorageTier
from hicache_core.kv.keys import TOKEN_NBYTES, JoinedKeys, PageKeys
from hicache_core.kv.spec import GroupKind
from hicache_core.pools.pins import PinnedUnits
from hicache_core.radix.node import Node, path_to
from hicache_core.types import ReadJob


@dataclass(frozen=True, slots=True)
class _Asked:
    """The units of one group that storage is asked for: of all pages from ``first`` on.

    ``held`` has a byte for each page of the request: 1 if the tree has its unit.
    """

    group: GroupParts
    first: int
    held: bytearray


@dataclass(frozen=True, slots=True)
class Question:
    """What storage is asked for, in one call: full pages, then units of each group.

    Attributes:
        keys: of full pages from ``first_page`` on, then of the units that may be needed.
        first_page: the first full page that the tree lacks.
        reached: pages of the prefix that can be used without storage.
        n_pages: pages of the request.
    """

    keys: Sequence[str]
    first_page: int
    reached: int
    n_pages: int
    _n_full: int
    _asked: tuple[_Asked, ...]

    def n_more(self, mask: Sequence[bool], most: int | None = None) -> tuple[int, str]:
        """How many pages beyond ``reached`` can be used, by what storage says it has.

        Args:
            mask: for each of ``keys`` whether storage has it.
            most: pages that are wanted at most; all if None.

        Returns:
            The pages, and the name of the group without which there would be more; empty if none.
        """
        limit = self.n_pages
        if self._n_full:
            limit = self.first_page
            for there in mask[: self._n_full]:
                if not there:
                    break
                limit += 1
        if most is not None:
            limit = min(limit, self.reached + most)
        start = self._n_full
        available: list[tuple[GroupParts, list[int]]] = []
        for asked in self._asked:
            known = bytearray(asked.held)
            for page in range(asked.first, self.n_pages):
                known[page] |= mask[start + page - asked.first]
            start += self.n_pages - asked.first
            available.append((asked.group, _runs(known)))
        cut_by = ""
        for boundary in range(limit, self.reached, -1):
            lacking = (
                group.held.group.name
                for group, runs in available
                if not _suffices(group, runs, boundary)
            )
            first = next(lacking, None)
            if first is None:
                return boundary - self.reached, cut_by
            cut_by = cut_by or first
        return 0, cut_by


def _runs(there: bytearray) -> list[int]:
    """For each page, how many pages without a gap end with it."""
    runs: list[int] = []
    length = 0
    for is_there in there:
        length = length + 1 if is_there else 0
        runs.append(length)
    return runs


def _suffices(group: GroupParts, runs: list[int], boundary: int) -> bool:
    held = group.held
    return runs[boundary - 1] >= boundary - held.group.first_needed(boundary, held.page_size)


class UnitReader:
    """Asks for and reads units of all groups of a cache. Owner thread.

    Units that are being read belong to the read. When everything of a prefetch has ended, those
    that arrived are given to the nodes of the prefix, and the others are freed.

    Attributes:
        n_running: reads that have not settled.
    """

    def __init__(self, parts: Parts, storage: StorageTier, paths: GroupPaths) -> None:
        """Reads nothing yet.

        Args:
            parts: of the cache.
            storage: its storage tier.
            paths: where room on the host comes from.
        """
        self._parts = parts
        self._storage = storage
        self._paths = paths
        self.n_running = 0

    def question(
        self, tokens: bytes, seed: bytes, node: Node, reached: int, storage: Attachment
    ) -> Question:
        """What to ask storage for a request.

        Args:
            tokens: packed tokens of its whole pages.
            seed: seed of the chain of page keys.
            node: the last node whose full pages the tree has.
            reached: pages of the prefix that can be used without storage.
            storage: the backend that is asked.
        """
        parts = self._parts
        first_page = node.depth_pages + node.n_pages
        asked = tuple(self._asked(group, node, tokens, reached) for group in parts.groups)
        keys: list[Sequence[str]] = []
        if parts.device.spec.components:
            keys.append(self._keys(storage.namespace, tokens, seed)[first_page:])
        n_full = sum(map(len, keys))
        for one, namespace in zip(asked, storage.group_namespaces, strict=True):
            keys.append(self._keys(namespace, tokens, seed)[one.first :])
        n_pages = self._n_pages(tokens)
        return Question(JoinedKeys(keys), first_page, reached, n_pages, n_full, asked)

    def _n_pages(self, tokens: bytes) -> int:
        return len(tokens) // (self._parts.page_size * TOKEN_NBYTES)

    def _keys(self, namespace: str, tokens: bytes, seed: bytes) -> PageKeys:
        return PageKeys(namespace, tokens, self._parts.page_size, seed)

    def _asked(self, group: GroupParts, node: Node, tokens: bytes, reached: int) -> _Asked:
        held = group.held
        first = held.group.first_needed(reached + 1, held.page_size)
        return _Asked(group, first, self._held(group, node, self._n_pages(tokens)))

    def _held(self, group: GroupParts, node: Node, n_pages: int) -> bytearray:
        there = bytearray(n_pages)
        is_state = group.held.group.kind is GroupKind.STATE
        for at in path_to(node):
            if group.held.get(at) is not None:
                stop = at.depth_pages + at.n_pages
                for page in range(stop - 1 if is_state else at.depth_pages, min(stop, n_pages)):
                    there[page] = 1
        return there

    def start(
        self,
        reads: UnitReads,
        tokens: bytes,
        seed: bytes,
        storage: Attachment,
        judge: Judge,
        settled: Callable[[], None],
    ) -> bool:
        """Submits the reads that a boundary needs.

        Args:
            reads: gets them.
            tokens: packed tokens of the request's whole pages.
            seed: seed of the chain of page keys.
            storage: the backend.
            judge: says how many units this rank reports for a result.
            settled: called after each read has settled.

        Returns:
            False if the host has no room for all of them.
        """
        node = self._parts.tree.locate(tokens, seed).node
        has_room = True
        for index, group in enumerate(self._parts.groups):
            first, stop = self._missing(group, node, reads.boundary)
            if first == stop:
                continue
            units = self._paths.allocate_host(group, stop - first)
            assert group.held.host is not None
            assert group.host is not None
            if len(units) < stop - first:
                group.held.host.free(units)
                group.counters.fetch_skipped_units += stop - first
                has_room = False
                continue
            group.held.host.n_lent += len(units)
            read = UnitRead(index, first, units)
            reads.reads.append(read)
            read.job_id = self._parts.jobs.add(partial(self._settled, read, settled))
            self.n_running += 1
            keys = self._keys(storage.group_namespaces[index], tokens, seed)[first:stop]
            nbytes = len(units) * group.host.object_nbytes
            job = ReadJob(read.job_id, keys, group.host.pages(units), nbytes)
            self._storage.submit(storage, job, judge)
        return has_room

    def _missing(self, group: GroupParts, node: Node, boundary: int) -> tuple[int, int]:
        """The range of pages whose units are needed at a boundary and are missing."""
        held = group.held
        there = self._held(group, node, boundary)
        needed = range(held.group.first_needed(boundary, held.page_size), boundary)
        missing = [page for page in needed if not there[page]]
        return (missing[0], missing[-1] + 1) if missing else (boundary, boundary)

    def _settled(self, read: UnitRead, settled: Callable[[], None], n_delivered: int) -> None:
        self.n_running -= 1
        read.n_delivered = n_delivered
        settled()

    def cancel_unstarted(self, reads: UnitReads, storage: Attachment) -> None:
        """Cancels the reads that no thread has begun."""
        for read in reads.reads:
            if read.n_delivered < 0:
                storage.worker.cancel(read.job_id)

    def attach(self, reads: UnitReads, tokens: bytes, seed: bytes, stored_in: int) -> bool:
        """Gives what has arrived to the nodes of the prefix, and frees the rest.

        Args:
            reads: all have ended.
            tokens: packed tokens of the request's whole pages.
            seed: seed of the chain of page keys.
            stored_in: number of the attachment that was read.

        Returns:
            Whether the prefix can be used up to the boundary now.
        """
        tree, page_size = self._parts.tree, self._parts.page_size
        prefix = tokens[: reads.boundary * page_size * TOKEN_NBYTES]
        node = tree.locate(prefix, seed).node
        for read in reads.reads:
            group = self._parts.groups[read.group]
            pool = group.held.host
            assert pool is not None
            if read.n_delivered == 0:  # on some rank the call may still run
                self._storage.quarantine.hold(read.job_id, read.units, partial(_free_lent, pool))
                continue
            pool.n_lent -= len(read.units)
            group.counters.fetched_units += read.n_delivered
            arrived, late = read.units[: read.n_delivered], read.units[read.n_delivered :]
            freed = tree.insert_host_units(node, read.group, read.first, arrived, stored_in)
            pool.free(freed + late)
        match = tree.match(prefix, seed, touch=False)
        return match.n_tokens == reads.boundary * page_size


def _free_lent(pool: PinnedUnits, units: array[int]) -> None:
    pool.n_lent -= len(units)
    pool.free(units)
