"""The engine's side of the cache: one owner thread, one ``poll()`` a scheduler step.

Read this file first, then ``prefetch.py``, ``load_back.py`` and ``write_path.py``: they are the
three stretches of a page's way, and everything else is a part that they use.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from hicache_core.controller.load_back import LoadBackPath
from hicache_core.controller.parts import Counters, Parts
from hicache_core.controller.prefetch import PrefetchPath
from hicache_core.controller.write_path import WritePath
from hicache_core.errors import IntegrityError, PoolExhausted, UseAfterClose
from hicache_core.page_keys import chain_seed, pack_tokens
from hicache_core.radix.node import Node
from hicache_core.radix.results import InsertResult, Match
from hicache_core.types import Namespace

Tokens = bytes | Sequence[int]
"""Packed little-endian u32 (fast), or anything that ``pack_tokens`` takes."""

DEFAULT_NAMESPACE = Namespace()


class Controller:
    """A prefix cache over device, host and storage, for one engine.

    Threads: every method is called by one thread, the engine's scheduler, which owns the tree, the
    pools and the table of jobs. Nothing here waits for storage but ``flush`` and ``close``.

    A request's life::

        cache.prefetch(request_id, tokens)          # at arrival: storage → host, in the background
        while not cache.prefetch_ready(request_id): cache.poll()
        match = cache.match_prefix(tokens)
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
        """Takes over ``parts``; ``build.HiCache`` makes them from a configuration."""
        self._parts = parts
        self._write_path = WritePath(parts)
        self._load_back_path = LoadBackPath(parts)
        self._prefetch_path = None if parts.worker is None else PrefetchPath(parts, parts.worker)
        self._closed = False

    # Reading.

    def match_prefix(
        self, tokens: Tokens, namespace: Namespace = DEFAULT_NAMESPACE, *, touch: bool = True
    ) -> Match:
        """The longest cached prefix, in whole pages: first what the device has, then the host.

        Args:
            tokens: the request's token ids.
            namespace: tenant salt, LoRA adapter: what separates equal tokens.
            touch: False only looks: recency, hit counts and counters stay as they are.

        Raises:
            InvalidTokens: negative, too large or no integers.
        """
        self._check_open()
        packed = pack_tokens(tokens)
        match = self._parts.tree.match(packed, chain_seed(namespace), touch=touch)
        if touch:
            counters = self._parts.counters
            counters.device_hit_tokens += match.n_device_tokens
            counters.host_hit_tokens += match.n_host_tokens
            counters.missed_tokens += len(packed) // 4 - match.n_tokens
        return match

    def prefetch(
        self, request_id: str, tokens: Tokens, namespace: Namespace = DEFAULT_NAMESPACE
    ) -> bool:
        """Asks storage for what device and host lack; returns at once.

        Returns:
            Whether storage is asked: False without a backend, or with fewer than
            ``prefetch_threshold`` tokens missing.
        """
        self._check_open()
        if self._prefetch_path is None:
            return False
        return self._prefetch_path.start(request_id, pack_tokens(tokens), chain_seed(namespace))

    def prefetch_ready(self, request_id: str) -> bool:
        """Whether the request may run now, by the prefetch policy; True for one never prefetched.

        Once this was True, ``match_prefix`` finds what has arrived. What is still being read then
        arrives for later requests.
        """
        return self._prefetch_path is None or self._prefetch_path.ready(request_id)

    def finish_prefetch(self, request_id: str) -> int:
        """Forgets a prefetch, giving up what has not arrived; tokens that storage delivered.

        To be called once for each prefetched request: when it starts, or when it is aborted.
        """
        return 0 if self._prefetch_path is None else self._prefetch_path.finish(request_id)

    def load_back(self, match: Match) -> Match:
        """Starts to copy the match's host part up; the match with all its pages on the device.

        ``match.node`` must be locked. With too little room on the device, the match comes back
        with its device part only, and the rest is computed again. The attention of layer i must
        call ``wait_layer(i)`` before it reads the pages.

        Raises:
            IntegrityError: the node is not locked, so its pages may have gone already.
        """
        self._check_open()
        n_pages = len(match.host_pages)
        if n_pages == 0:
            return match
        if not match.node.lock_count:
            raise IntegrityError("load_back of a match whose node is not locked; lock it first")
        try:
            device_pages = self.allocate(n_pages)
        except PoolExhausted:
            self._parts.counters.load_back_skipped_pages += n_pages
            return match.device_part()
        return self._load_back_path.start(match, device_pages)

    def wait_layer(self, layer: int) -> None:
        """Returns when layer ``layer`` of everything being loaded is on the device.

        Raises:
            LoadFailed: a copy failed; its pages hold nothing and the requests start over.
        """
        self._load_back_path.wait_layer(layer)

    # Writing.

    def allocate(self, n_pages: int) -> array[int]:
        """``n_pages`` free device pages, evicting what may go.

        Raises:
            PoolExhausted: everything else is locked; nothing was taken.
        """
        self._check_open()
        allocator = self._parts.device.allocator
        if allocator.n_free < n_pages:
            self.evict(n_pages - allocator.n_free)
        return allocator.allocate(n_pages)

    def free(self, device_pages: array[int]) -> None:
        """Gives back pages that the caller allocated and did not insert."""
        self._parts.device.allocator.free(device_pages)

    def insert(
        self,
        tokens: Tokens,
        device_pages: array[int],
        namespace: Namespace = DEFAULT_NAMESPACE,
        *,
        priority: int = 0,
    ) -> InsertResult:
        """Puts a computed prefix into the tree and starts what the write policy wants.

        Args:
            tokens: the prefix; a tail shorter than a page is left out.
            device_pages: one page for each whole page of ``tokens``, in order.
            namespace: as in ``match_prefix``.
            priority: higher stays longer, under the priority eviction policy.

        Returns:
            ``pages``: the pages to use from now on; ``duplicates``: those of the caller that the
            tree already had under other ids, to be handed to ``free`` once unused.
        """
        self._check_open()
        packed = pack_tokens(tokens)
        result = self._parts.tree.insert(
            packed, device_pages, chain_seed(namespace), priority=priority
        )
        if self._parts.host is not None:
            self._write_path.consider(result.node)
        return result

    def lock(self, node: Node) -> None:
        """Keeps a prefix: what it has on the device stays there; counted, so calls nest."""
        self._parts.tree.lock(node)

    def unlock(self, node: Node) -> None:
        """Takes one ``lock`` back."""
        self._parts.tree.unlock(node)

    def evict(self, n_pages: int) -> int:
        """Frees device pages, the least useful first; how many.

        Pages with a host copy leave the device only; others go, or under write_back are copied to
        the host first. Waits for copies under way when nothing else can go.
        """
        parts = self._parts
        backs_up = parts.write_policy.backs_up_before_eviction and parts.host is not None
        n_freed = n_on_their_way = 0
        while n_freed < n_pages:
            n_wanted = n_pages - n_freed - n_on_their_way
            victim = None
            if n_wanted > 0:
                victim = parts.tree.device_victim(n_wanted, back_up_first=backs_up)
            if victim is not None and backs_up and self._goes_to_host(victim):
                n_on_their_way += victim.n_pages
            elif victim is not None and parts.tree.may_drop_device(victim):
                n_freed += self._drop_device(victim)
            elif self._wait_for_copy():
                n_on_their_way = 0
            else:
                break
        return n_freed

    def _goes_to_host(self, node: Node) -> bool:
        """Starts a copy to the host, unless there is one or the host has no room."""
        return node.host_pages is None and self._write_path.backup(node)

    def _drop_device(self, node: Node) -> int:
        parts = self._parts
        dropped = parts.tree.drop_device(node)
        parts.device.allocator.free(dropped.device_pages)
        if dropped.host_pages:
            assert parts.host is not None
            parts.host.allocator.free(dropped.host_pages)
        parts.counters.evicted_device_pages += len(dropped.device_pages)
        return len(dropped.device_pages)

    def _wait_for_copy(self) -> bool:
        """Waits for the oldest copy and settles it; False if there is none."""
        ticket = self._parts.jobs.oldest_copy
        if ticket is None:
            return False
        ticket.wait()
        self.poll()
        return True

    # Time.

    def poll(self) -> None:
        """Settles what has finished; called once a scheduler step, by every rank."""
        parts = self._parts
        parts.jobs.collect_copies()
        if parts.worker is not None:
            for result in parts.worker.drain():
                parts.jobs.report(result.job.job_id, result.n_pages)
        for settle, n_pages in parts.jobs.settled():
            settle(n_pages)

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Waits until everything accepted so far is on the host and in storage.

        Returns:
            False if that took longer than ``timeout_s``.
        """
        self._check_open()
        return self._drain(timeout_s)

    def _drain(self, timeout_s: float) -> bool:
        parts = self._parts
        deadline = parts.clock() + timeout_s
        self.poll()
        while not self._write_path.idle:
            left_s = deadline - parts.clock()
            if left_s <= 0:
                return False
            copy = parts.jobs.oldest_copy
            if copy is not None:
                copy.wait(left_s)
            elif parts.worker is not None and not parts.jobs.has_reports:
                parts.worker.wait(left_s)
            self.poll()
        return True

    def close(self, timeout_s: float = 10.0) -> None:
        """Drains writes for at most ``timeout_s``, then releases everything; may be called twice.

        With a storage backend that does not answer, what it still holds is abandoned after the time
        is over, and the log says what.
        """
        if self._closed:
            return
        self._drain(timeout_s)
        self._closed = True
        parts = self._parts
        if parts.transfer is not None:
            parts.transfer.close()
        abandoned = [] if parts.worker is None else parts.worker.close(timeout_s)
        if parts.backend is not None and not abandoned:
            parts.backend.close()  # one that hangs in a call is left alone
        if parts.host is not None:
            parts.host.close()

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
        if self._closed:
            raise UseAfterClose("this cache was closed; open a new one")

    # Looking.

    @property
    def counters(self) -> Counters:
        """What happened since the start."""
        return self._parts.counters

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self._parts.page_size

    def check_integrity(self) -> None:
        """Checks every invariant, in time proportional to the cache; for tests.

        Raises:
            IntegrityError: with what does not add up.
        """
        parts = self._parts
        parts.tree.check_integrity()
        parts.device.allocator.check_integrity()
        n_device = parts.device.allocator.n_pages - parts.device.allocator.n_free
        if parts.tree.n_device_pages > n_device:
            raise IntegrityError(
                f"the tree holds {parts.tree.n_device_pages} device pages, {n_device} are allocated"
            )
        if parts.host is None:
            return
        parts.host.allocator.check_integrity()
        n_host = parts.host.allocator.n_pages - parts.host.allocator.n_free
        if parts.tree.n_host_pages != n_host:
            raise IntegrityError(
                f"the tree holds {parts.tree.n_host_pages} host pages, {n_host} are allocated"
            )
