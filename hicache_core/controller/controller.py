"""The controller: what an engine calls. One owner thread, one ``poll()`` per scheduler step.

Read this file first, then ``prefetch.py``, ``load_back.py`` and ``write_path.py``: these are the
three ways that a page takes between the tiers. Everything else is a part that they use.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from hicache_core.controller.attachment import Attaching, Clearing
from hicache_core.controller.evictor import Evictor
from hicache_core.controller.explain import Cut, Explanation, Hits
from hicache_core.controller.groups import GroupPaths
from hicache_core.controller.load_back import LoadBackPath
from hicache_core.controller.parts import Counters, Parts
from hicache_core.controller.prefetch import PrefetchPath
from hicache_core.controller.snapshot import take_snapshot
from hicache_core.controller.storage_tier import StorageTier
from hicache_core.controller.unit_reads import UnitReader
from hicache_core.controller.write_path import WritePath
from hicache_core.errors import (
    ConfigError,
    IntegrityError,
    PoolExhausted,
    RankLost,
    UseAfterClose,
)
from hicache_core.kv.keys import TOKEN_NBYTES, chain_seed, pack_tokens, page_digests
from hicache_core.observe.snapshot import CacheSnapshot
from hicache_core.process.owner import Owner
from hicache_core.radix.node import Node
from hicache_core.radix.results import InsertResult, Match, NewUnits
from hicache_core.types import Namespace, Tier

log = logging.getLogger(__name__)

Tokens = bytes | Sequence[int]
"""Token ids: packed little-endian u32 (fast), or anything that ``pack_tokens`` takes."""

Groups = Sequence[Sequence[NewUnits]]
"""For each group of layers, in the order of the spec, runs of filled units."""

DEFAULT_NAMESPACE = Namespace()

WAIT_S = 1.0
"""The longest single wait, in seconds, so that a job's deadline is noticed soon after it passed."""

RETRY_S = 0.01
"""The longest wait while reports of this rank wait for other ranks, in seconds."""


class Controller:
    """A prefix cache over device, host and storage, for one engine.

    Threads: one thread, the engine's scheduler, calls every method. It owns the tree, the pools and
    the table of jobs. The owner is the first thread that calls; ``owner`` can hand the cache over.
    Any other thread, and a forked child, gets ``WrongThread``. Any thread may call ``snapshot`` and
    ``explain`` and read plain properties. Only ``wait``, ``flush`` and ``close`` wait for storage.

    Ranks: with several ranks, all make the same calls in the same order. ``poll``, ``allocate``,
    ``evict``, ``flush`` and ``close`` may enter a collective. All but ``close`` raise ``RankLost``
    once another rank is gone.

    Failed loads: the rank whose load_back fails learns of it from ``wait_layer``, before the other
    ranks do. So with several ranks no rank acts on ``LoadFailed`` alone, and what was computed from
    loaded pages is neither inserted nor given to a client before all ranks know. A request that was
    matched before a load failed starts over. Before its next forward pass it checks::

        n_failed = cache.n_failed_loads             # with match_prefix
        while not cache.loads_settled: cache.wait(0.001); cache.poll()
        if cache.n_failed_loads != n_failed: ...    # give up the pages; match_prefix again

    The life of a request::

        cache.prefetch(request_id, tokens)          # at arrival: storage → host, in the background
        while not cache.prefetch_ready(request_id): cache.poll()
        cache.finish_prefetch(request_id)
        match = cache.match_prefix(tokens, request_id=request_id)
        cache.lock(match.node)
        match = cache.load_back(match)              # host → device, layer by layer
        pages = match.device_pages + cache.allocate(n_missing_pages)
        ...                                         # forward; wait_layer(i) before attention i
        result = cache.insert(tokens, pages)
        cache.free(result.duplicates)
        cache.unlock(match.node)

    Pages that ``allocate`` returned belong to the caller until ``insert`` takes them or ``free``
    gives them back.
    """

    def __init__(self, parts: Parts) -> None:
        """Takes over ``parts``, which ``HiCache`` makes from a configuration."""
        self._parts = parts
        self._write_path = WritePath(parts)
        self._load_back_path = LoadBackPath(parts)
        self._group_paths = GroupPaths(parts, self._wait_for_copy)
        self._prefetch_path: PrefetchPath | None = None
        if parts.storage is not None and parts.host is not None:
            parts.storage.when_lost = self._tell_everything_again
            units = UnitReader(parts, parts.storage, self._group_paths)
            self._prefetch_path = PrefetchPath(parts, parts.storage, parts.host, units)
        self._evictor = Evictor(parts, self._write_path, self._prefetch_path, self._settle)
        self._closed = False
        self.owner = Owner("this cache")

    # Reading.

    def match_prefix(
        self,
        tokens: Tokens,
        namespace: Namespace = DEFAULT_NAMESPACE,
        *,
        touch: bool = True,
        request_id: str | None = None,
        n_behind: int = 0,
    ) -> Match:
        """Finds the longest cached prefix, in whole pages: a device part, then a host part.

        Args:
            tokens: the request's token ids.
            namespace: tenant salt and LoRA adapter, which keep equal tokens apart.
            touch: False only looks: recency, hit counts and counters stay as they are.
            request_id: the request, if ``explain`` is to know of this match.
            n_behind: tokens of the prompt after ``tokens``, which are computed in any case.

        Raises:
            InvalidTokens: a token is negative, too large or not an integer.
        """
        self._check_open()
        packed = pack_tokens(tokens)
        match = self._parts.tree.match(packed, chain_seed(namespace), touch=touch)
        if touch:
            counters = self._parts.counters
            n_found, n_from_host = match.n_tokens, match.n_tokens_from_host
            counters.device_hit_tokens += n_found - n_from_host
            counters.host_hit_tokens += n_from_host
            n_prompt = len(packed) // TOKEN_NBYTES + n_behind
            counters.missed_tokens += n_prompt - n_found
            if match.cut_by:
                self._group_paths.count_cut(match)
            if request_id is not None:
                self._record(request_id, packed, namespace, match, n_prompt)
        return match

    def device_part(self, match: Match) -> Match:
        """The longest part of a match whose full pages are all on the device."""
        self.owner.check()
        return self._parts.tree.device_part(match)

    def _record(
        self, request_id: str, tokens: bytes, namespace: Namespace, match: Match, n_prompt: int
    ) -> None:
        """Tells the explainer what of a prompt of ``n_prompt`` tokens was found."""
        explainer, tree, page_size = self._parts.explainer, self._parts.tree, self._parts.page_size
        if explainer is None:
            return
        page_nbytes = page_size * TOKEN_NBYTES
        start = match.n_tokens * TOKEN_NBYTES
        page = tokens[start : start + page_nbytes]
        was_looked_up = bool(tokens) or n_prompt <= page_size

        def missed_page() -> bytes:
            return page_digests(page, page_size, tree.last_digest(match.node))

        n_from_host = match.n_tokens_from_host
        explainer.matched(
            request_id,
            Hits(match.n_tokens - n_from_host, n_from_host, n_prompt),
            missed_page if len(page) == page_nbytes else None,
            page_digests(tokens[:page_nbytes], page_size) if was_looked_up else None,
            namespace,
            Cut(match.cut_by, match.n_uncut_tokens) if match.cut_by else None,
        )

    def explain(self, request_id: str) -> Explanation | None:
        """Says where a request's tokens came from, and why the others were not cached.

        It knows the last thousand requests whose id was passed to ``match_prefix``; None for any
        other. The answer may say that another tenant has a prefix, so it is for operators only.
        """
        explainer = self._parts.explainer
        return None if explainer is None else explainer.explain(request_id)

    def prefetch(
        self, request_id: str, tokens: Tokens, namespace: Namespace = DEFAULT_NAMESPACE
    ) -> bool:
        """Asks storage for the pages that neither device nor host has. Returns at once.

        Args:
            request_id: the request; ``prefetch_ready`` and ``finish_prefetch`` take the same id.
            tokens: the request's token ids.
            namespace: as in ``match_prefix``.

        Returns:
            Whether storage is asked: False without a backend, or if fewer than
            ``prefetch_threshold`` tokens are missing.

        Raises:
            InvalidTokens: as in ``match_prefix``.
        """
        self._check_open()
        if self._prefetch_path is None:
            return False
        seed = chain_seed(namespace)
        self._parts.tell_namespace(seed, namespace)
        return self._prefetch_path.start(request_id, pack_tokens(tokens), seed)

    def prefetch_ready(self, request_id: str) -> bool:
        """Whether the prefetch policy lets the request run now; True if it was never prefetched.

        ``match_prefix`` then finds the pages that have arrived. The others arrive for later
        requests.
        """
        self.owner.check()
        return self._prefetch_path is None or self._prefetch_path.ready(request_id)

    def finish_prefetch(self, request_id: str) -> int:
        """Ends a prefetch and gives up what has not arrived.

        To be called once for each prefetched request: when it starts, or when it is aborted.

        Returns:
            Tokens that storage delivered for the request; 0 for a request that was not prefetched.
        """
        self.owner.check()
        n_tokens = 0 if self._prefetch_path is None else self._prefetch_path.finish(request_id)
        if n_tokens and self._parts.explainer is not None:
            self._parts.explainer.delivered(request_id, n_tokens)
        return n_tokens

    def prefilled(self, n_tokens: int, elapsed_s: float) -> None:
        """Tells the cache that the engine computed ``n_tokens`` of a prompt in ``elapsed_s``.

        The admission policy ``cost_aware`` compares loads with it. While nobody calls this, the
        policy loads small probes only.
        """
        self.owner.check()
        storage = self._parts.storage
        if storage is not None and storage.current is not None:
            storage.current.admission.prefilled(n_tokens, elapsed_s)

    def load_back(self, match: Match) -> Match:
        """Starts to copy the host part of a match to the device. Returns at once.

        The caller must have locked ``match.node``. The attention of layer i must call
        ``wait_layer(i)`` before it reads the pages.

        Returns:
            The match with all its pages on the device. If the device has too little room, the
            match with its device part only: the caller computes the rest again. Of a model with
            groups it locks the node of that one, and unlocks the other: a shorter prefix needs
            other units.

        Raises:
            IntegrityError: the node is not locked, so its pages may be gone already.
        """
        self._check_open()
        if match.is_on_device:
            return match
        if not match.node.lock_count:
            raise IntegrityError("load_back of a match whose node is not locked; lock it first")
        if self._parts.groups:  # an insert may have brought units, so that the host's could go
            match = match._replace(groups=self._parts.tree.units(match.node))
        n_pages = len(match.host_pages)
        own: tuple[array[int], ...] = ()
        try:
            own = self._group_paths.allocate_for(match)
            device_pages = self.allocate(n_pages)
        except PoolExhausted:
            self._group_paths.free(own)
            self._parts.counters.load_back_skipped_pages += n_pages
            for group, units in zip(self._parts.groups, match.groups, strict=True):
                group.counters.load_skipped_units += units.n_on_host
            return self._parts.tree.device_part(match)
        loaded = self._load_back_path.start(match, device_pages) if n_pages else match
        if loaded.n_tokens < match.n_tokens:
            self._group_paths.free(own)
            return loaded
        return self._group_paths.load(loaded, own) if own else loaded

    def wait_layer(self, layer: int) -> None:
        """Blocks until layer ``layer``, from 0, of everything being loaded is on the device.

        Raises:
            LoadFailed: a copy failed and its pages hold nothing. Requests start over; with several
                ranks as the class says.
        """
        self.owner.check()
        try:
            self._load_back_path.wait_layer(layer)
        finally:  # a failure of both is told once, not again to who loads next
            if self._parts.groups:
                self._group_paths.wait_layer(layer)

    @property
    def loads_settled(self) -> bool:
        """Whether every load has settled; the same on all ranks."""
        return self._load_back_path.idle and self._group_paths.loads_settled

    @property
    def n_failed_loads(self) -> int:
        """How many settled loads failed on any rank; the same on all ranks."""
        return self._load_back_path.n_failed + self._group_paths.n_failed

    # Writing.

    def allocate(self, n_pages: int) -> array[int]:
        """Takes ``n_pages`` free device pages, and evicts others if there are too few.

        Returns:
            Page ids of the device pool, shape ``(n_pages,)``.

        Raises:
            PoolExhausted: too few pages may leave the device; nothing was taken.
        """
        self._check_open()
        allocator = self._parts.device.allocator
        if allocator.n_free < n_pages:
            self.evict(n_pages - allocator.n_free)
        return allocator.allocate(n_pages)

    def free(self, device_pages: array[int]) -> None:
        """Gives back device pages that the caller allocated and did not insert."""
        self.owner.check()
        self._parts.device.allocator.free(device_pages)

    def allocate_units(self, group: int, n: int) -> array[int]:
        """Takes ``n`` free device units of a group, and evicts others if there are too few.

        Args:
            group: index of the group in the spec.
            n: how many.

        Returns:
            Unit ids of the group's device pool, shape ``(n,)``.

        Raises:
            PoolExhausted: too few units may leave the device; nothing was taken.
        """
        self._check_open()
        return self._group_paths.allocate(self._parts.groups[group], n)

    def free_units(self, group: int, units: array[int]) -> None:
        """Gives back device units of a group that the caller allocated and did not insert."""
        self.owner.check()
        self._parts.groups[group].held.device.free(units)

    def insert(
        self,
        tokens: Tokens,
        device_pages: array[int],
        namespace: Namespace = DEFAULT_NAMESPACE,
        *,
        priority: int = 0,
        groups: Groups = (),
        keep_end: bool = True,
    ) -> InsertResult:
        """Puts a computed prefix into the tree and starts what the write policy wants.

        Args:
            tokens: the prefix; a tail shorter than a page is left out.
            device_pages: one page id for each whole page of ``tokens``, in order.
            namespace: as in ``match_prefix``.
            priority: higher stays longer, under the priority eviction policy.
            groups: by group, in the order of the spec, runs of units that the caller has filled.
                Those of a window that are outside of it at the end of ``tokens`` go down by the
                write policy, and leave the device at once.
            keep_end: False for a part of a prompt or an answer whose rest follows. The windows at
                its end then leave the device, too, once they are no longer locked; a request that
                matches this prefix, and a longer one that needs them, keep them there.

        Returns:
            ``pages``: the pages to use from now on. ``duplicates``: pages of the caller that the
            tree already had under other ids; pass them to ``free`` once nothing uses them.
            ``units`` and ``unit_duplicates`` say the same of the groups.

        Raises:
            InvalidTokens: as in ``match_prefix``.
            IntegrityError: the number of pages does not fit the tokens.
        """
        result = self._put(tokens, device_pages, namespace, priority, groups, keep_end=keep_end)
        if self._parts.host is not None:
            self._write_path.consider(result.node)
        if self._parts.groups:
            self._group_paths.consider(result.node)
        return result

    def insert_received(
        self,
        tokens: Tokens,
        device_pages: array[int],
        namespace: Namespace = DEFAULT_NAMESPACE,
        *,
        priority: int = 0,
        groups: Groups = (),
    ) -> InsertResult:
        """As ``insert``, for pages that another server computed, and may be storing already.

        They go down with the next ``insert`` of this prefix or a longer one. Storage is asked then,
        in the background, and pages that it has are not written. The arguments ``tokens``,
        ``device_pages``, ``namespace``, ``priority`` and ``groups`` are those of ``insert``.
        """
        result = self._put(tokens, device_pages, namespace, priority, groups)
        self._write_path.received.mark(result.new_nodes)
        return result

    def _put(
        self,
        tokens: Tokens,
        device_pages: array[int],
        namespace: Namespace,
        priority: int,
        groups: Groups,
        *,
        keep_end: bool = True,
    ) -> InsertResult:
        self._check_open()
        seed = chain_seed(namespace)
        result = self._parts.tree.insert(
            pack_tokens(tokens),
            device_pages,
            seed,
            priority=priority,
            groups=groups,
            keep_end=keep_end,
        )
        if self._parts.journal is not None:
            self._parts.tell_namespace(seed, namespace)
            for node in result.new_nodes:
                self._parts.tell_stored(Tier.DEVICE, node)
        return result

    def lock(self, node: Node) -> None:
        """Keeps the device pages of a prefix on the device. Locks are counted, so calls nest.

        Args:
            node: the end of the prefix: ``Match.node`` or ``InsertResult.node``.

        Raises:
            IntegrityError: the node has left the tree.
        """
        self.owner.check()
        self._parts.tree.lock(node)

    def unlock(self, node: Node) -> None:
        """Takes back one ``lock`` of ``node``."""
        self.owner.check()
        self._parts.tree.unlock(node)
        if self._parts.groups:
            self._group_paths.unlocked(node)

    def evict(self, n_pages: int) -> int:
        """Frees at least ``n_pages`` device pages if it can, the least useful first.

        Pages with a host copy leave the device only. Pages without one are dropped, or copied to
        the host first under write_back. Waits for copies that are running when nothing else can go.

        Returns:
            How many pages were freed: fewer than ``n_pages`` when the others are in use.
        """
        self.owner.check()
        return self._evictor.evict(n_pages)

    def reset(self) -> bool:
        """Drops all pages of device and host. Storage keeps what it has.

        Returns:
            False, and nothing has changed, while anything is in use.
        """
        self._check_open()
        return self._reads_idle and self._group_paths.idle and self._evictor.reset()

    def _tell_everything_again(self) -> None:
        self._parts.tell_everything_again()
        if self._parts.journal is not None and self._parts.journal.hears_gains:
            self._group_paths.tell_everything_again()

    @property
    def _reads_idle(self) -> bool:
        return self._prefetch_path is None or self._prefetch_path.idle

    # Storage comes, goes and is emptied while requests run.

    def attach_storage(self, name: str, settings: Mapping[str, object]) -> Attaching:
        """Opens a storage backend, which replaces the present one. Returns at once.

        ``poll`` attaches the backend when it is open on all ranks. The one before is drained and
        closed. A backend that cannot be used leaves everything as it is.

        Args:
            name: an installed plugin, ``chain`` or ``dynamic``.
            settings: the backend's own settings.

        Returns:
            Says whether it is ``done``, and its ``error``.

        Raises:
            ConfigError: this cache has no host tier.
        """
        self._check_open()
        return self._storage_tier().attach(name, settings)

    def detach_storage(self) -> None:
        """Goes on without storage. Accepted writes still end, then the backend is closed.

        Raises:
            ConfigError: this cache has no host tier.
        """
        self._check_open()
        self._storage_tier().detach()

    def clear_storage(self) -> Clearing:
        """Removes from the store what this cache, on all its ranks, has put there. Returns at once.

        What is stored meanwhile may stay. Once the call is done, pages count as not stored, and
        are written again at their next use.

        Returns:
            Says whether it is ``done``, how many ``n_objects`` were removed, and its ``error``.

        Raises:
            ConfigError: no backend is attached, or it cannot be cleared.
        """
        self._check_open()
        return self._storage_tier().clear()

    @property
    def storage_name(self) -> str | None:
        """Name of the attached backend; None without one."""
        storage = self._parts.storage
        return None if storage is None or storage.current is None else storage.current.name

    def _storage_tier(self) -> StorageTier:
        if self._parts.storage is None:
            raise ConfigError("storage needs enable_hierarchical_cache: true")
        return self._parts.storage

    # Time.

    def poll(self) -> None:
        """Settles what has finished. Every rank calls it once per scheduler step.

        Raises:
            RankLost: another rank died, or does not answer.
        """
        self.owner.check()
        self._settle()

    def _settle(self, flag: int = 1) -> int:
        """One ``poll``: enters the collective once; returns the least of the ranks' flags."""
        parts = self._parts
        parts.jobs.collect_copies()
        if parts.storage is not None:
            parts.storage.collect()
        if self._prefetch_path is not None:
            self._prefetch_path.tick()
        agreement = parts.jobs.agree(flag)
        for settle, n_pages in agreement.settled:
            settle(n_pages)
        if parts.storage is not None:
            parts.storage.sweep()
        return agreement.flag

    def wait(self, timeout_s: float) -> None:
        """Blocks until storage or a copy has finished something, for at most ``timeout_s``.

        To be called between two ``poll()``. While reports of this rank wait for other ranks it
        blocks for at most ``RETRY_S``.
        """
        self.owner.check()
        self._wait(timeout_s)

    def _wait(self, timeout_s: float, *, for_all: bool = False) -> None:
        """As ``wait``; with ``for_all`` until all jobs that storage was given have ended."""
        parts = self._parts
        if parts.jobs.has_reports:
            timeout_s = min(timeout_s, RETRY_S)
        oldest_copy = parts.jobs.oldest_copy
        if oldest_copy is not None:
            oldest_copy.wait(timeout_s)
        elif parts.storage is not None and parts.storage.attachments:
            parts.storage.wait(timeout_s, for_all=for_all)
        else:  # nothing of this rank can finish; another rank's copy may, or a timer
            parts.sleep(min(timeout_s, RETRY_S))

    def _wait_for_copy(self) -> bool:
        return self._evictor.wait_for_copy()

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Blocks until everything accepted so far is on the host and durable in storage.

        Returns:
            False if that took longer than ``timeout_s`` seconds on any rank.
        """
        self._check_open()
        return self._drain(timeout_s)

    def _drain(self, timeout_s: float) -> bool:
        """As ``flush``. Every rank enters the same number of collectives, whatever its clock."""
        parts = self._parts
        deadline = parts.clock() + timeout_s
        in_time = self._settle(int(timeout_s > 0))
        while in_time and not (self._write_path.idle and self._group_paths.idle):
            self._wait(min(max(deadline - parts.clock(), 0.0), WAIT_S), for_all=True)
            in_time = self._settle(int(parts.clock() < deadline))
        if not in_time or parts.storage is None:
            return bool(in_time)
        left_s = max(0.0, deadline - parts.clock())
        return bool(self._settle(int(parts.storage.flush(left_s))))

    def close(self, timeout_s: float = 10.0) -> None:
        """Waits at most ``timeout_s`` seconds for writes, then releases everything.

        May be called twice. Jobs of a storage backend that does not answer are abandoned when the
        time is over, and the log says how many. With a lost rank it does not wait. In a forked
        child it does nothing.
        """
        if self._closed or self.owner.is_forked:
            return
        self.owner.check()
        try:
            self._drain(timeout_s)
        except RankLost as error:
            log.warning("closed without waiting for the other ranks: %s", error)
        self._closed = True
        parts = self._parts
        for transfer in (parts.transfer, *(group.transfer for group in parts.groups)):
            if transfer is not None:
                transfer.close()
        abandoned = [] if parts.storage is None else parts.storage.close(timeout_s)
        if abandoned:
            log.warning("host memory stays: %d storage jobs may still touch it", len(abandoned))
        elif parts.host is not None:
            parts.host.close()
            for group in parts.groups:
                if group.host is not None:
                    group.host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        self.owner.check()
        if self._closed:
            raise UseAfterClose("this cache was closed; open a new one")

    # Looking.

    @property
    def parts(self) -> Parts:
        """What the cache is made of, for tests and tools that look inside.

        The parts belong to the owner thread. An engine needs none of them.
        """
        return self._parts

    @property
    def counters(self) -> Counters:
        """Counts of what happened since the start. Any thread may read."""
        return self._parts.counters

    def snapshot(self) -> CacheSnapshot:
        """Takes one look at everything, for metrics and status. Any thread may call."""
        return take_snapshot(self._parts, self._write_path, self._prefetch_path)

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self._parts.page_size

    def check_integrity(self) -> None:
        """Checks the tree, and that every page of both pools is free or has an owner.

        For tests: takes time proportional to the cache. Owner thread.

        Raises:
            IntegrityError: names the rule that does not hold.
        """
        n_orphaned = self._write_path.n_orphaned_pages
        if self._prefetch_path is not None:
            n_orphaned += self._prefetch_path.n_orphaned_pages
        self._parts.check_integrity(n_orphaned)
