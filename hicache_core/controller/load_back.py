"""Host → device: layer by layer, ahead of the attention that reads it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import partial

from hicache_core.controller.parts import Parts
from hicache_core.copies.base import Ticket
from hicache_core.errors import LoadFailed
from hicache_core.observe.tracing import LOAD_BACK, SpanHandle
from hicache_core.radix.node import Node, run_of
from hicache_core.radix.results import Match
from hicache_core.types import Tier


@dataclass(frozen=True, slots=True, eq=False)
class LoadBack:
    """A copy to the device that has not settled: the run of ``n_pages`` that ends at ``node``."""

    ticket: Ticket
    node: Node
    n_pages: int
    started_s: float
    span: SpanHandle


class LoadBackPath:
    """Copies host hits into device pages. Owner thread only.

    The nodes count as device hits at once. Whoever reads them calls ``wait_layer`` first, so a
    second request with the same prefix waits for the same copy.

    Attributes:
        n_failed: settled copies that failed on some rank.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._under_way: list[LoadBack] = []
        self._failed: list[
            LoadBack
        ] = []  # settled before anybody waited; wait_layer raises for them
        self.n_failed = 0

    @property
    def idle(self) -> bool:
        """Whether every copy has settled: the same on all ranks."""
        return not self._under_way

    def start(self, match: Match, device_pages: array[int]) -> Match:
        """Submits the copy of the match's host part into ``device_pages``, one page each.

        If what the match has on the device was being loaded, and that has failed since, there is
        nothing to hang the rest on: only the device part comes back, and ``wait_layer`` tells.
        """
        parts, tree = self._parts, self._parts.tree
        if match.device_node.parent is not None and not match.device_node.on_device:
            parts.device.allocator.free(device_pages)
            parts.counters.load_back_skipped_pages += len(device_pages)
            return parts.tree.device_part(match)
        node, n_pages = match.node, len(match.host_pages)
        tree.attach_device(node, n_pages, device_pages)
        assert parts.transfer is not None
        ticket = parts.transfer.to_device(match.host_pages, device_pages)
        span = parts.spans.begin(LOAD_BACK, pages=n_pages)
        load_back = LoadBack(ticket, node, n_pages, parts.clock(), span)
        self._under_way.append(load_back)
        parts.jobs.add_copy(ticket, n_pages, partial(self._settled, load_back))
        return match._replace(
            device_pages=match.device_pages + device_pages,
            host_pages=array("i"),
            device_node=node,
        )

    def wait_layer(self, layer: int) -> None:
        """Blocks until layer ``layer`` of every running copy has arrived.

        Raises:
            LoadFailed: a copy failed. Its pages hold nothing and belong to the pool again; every
                request that matched them starts over from ``match_prefix``. A failure that was
                raised before its job settled is raised once more afterwards: a request may have
                matched those pages in between, and computing once too often does no harm.
        """
        failed, self._failed = self._failed, []
        for load_back in failed:
            load_back.ticket.wait_layer(layer)
            raise LoadFailed(f"{load_back.n_pages} pages did not arrive on another rank")
        for load_back in self._under_way:
            load_back.ticket.wait_layer(layer)

    def _settled(self, load_back: LoadBack, n_valid: int) -> None:
        parts = self._parts
        self._under_way.remove(load_back)
        ok = n_valid == load_back.n_pages
        load_back.span.end(error="" if ok else "the copy failed")
        if not ok:
            self._failed.append(load_back)
            self.n_failed += 1
        freed = parts.tree.settle_device(load_back.node, load_back.n_pages, ok=ok)
        parts.device.allocator.free(freed)
        if ok and not freed:
            parts.counters.load_back_tokens += load_back.n_pages * parts.page_size
            parts.timings.load_back_s.add(parts.clock() - load_back.started_s)
            if parts.journal is not None:
                for node in run_of(load_back.node, load_back.n_pages):
                    parts.tell_stored(Tier.DEVICE, node)
