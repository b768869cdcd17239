"""The invariants that are checked after each step, beside those that the controller checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hicache_core.controller.controller import Controller
from hicache_core.radix.node import Node, Received
from hicache_core.types import ExistsJob, ReadJob
from tests.simulation.clock import InvariantBroken
from tests.simulation.engine import Engine
from tests.simulation.journal_replay import JournalReplay
from tests.simulation.worker import SimWorker

Snapshot = list[tuple[object, ...]]


def check_rank(engine: Engine, workers: Sequence[SimWorker], replay: JournalReplay) -> None:
    """Everything that one rank alone can tell."""
    engine.cache.check_integrity()
    nodes = engine.cache.parts.tree.nodes()
    replay.check(engine.cache, nodes)
    check_device_owners(engine, nodes)
    check_questions(engine.cache, nodes)
    for worker in workers:
        worker.check_integrity()
    check_named_pages(engine.cache, workers)


def check_questions(cache: Controller, nodes: Sequence[Node]) -> None:
    """Pages wait for an answer of storage only while a question is under way."""
    asked = [node for node in nodes if node.received is Received.CHECKING]
    if asked and cache._write_path.received.idle:
        raise InvariantBroken(f"answered: {asked} wait for an answer, and nobody asks")


def check_device_owners(engine: Engine, nodes: Sequence[Node]) -> None:
    """free + cached + held = total, and no device page has two owners."""
    tree = engine.cache.parts.tree
    owned = [page for node in nodes for page in node.device_pages or ()]
    owned += [page for pages in tree._residency.doomed.values() for page in pages]
    owned += engine.held_pages()
    allocator = engine.pool.allocator
    if len(set(owned)) != len(owned):
        twice = [page for page, n in Counter(owned).items() if n > 1]
        raise InvariantBroken(f"one owner: device pages {twice} have two")
    if len(owned) + allocator.n_free != allocator.n_pages:
        raise InvariantBroken(
            f"free + cached + in flight = total: {allocator.n_free} device pages are free, "
            f"{len(owned)} have an owner, of {allocator.n_pages}"
        )


def check_named_pages(cache: Controller, workers: Sequence[SimWorker]) -> None:
    """Bytes that an unfinished job names are not free, and no two jobs fill the same bytes."""
    host = cache.parts.host
    if host is None:
        return
    free = set(host.allocator._free)
    filled: set[int] = set()
    read: set[int] = set()
    for worker in workers:
        for job in worker.unfinished():
            if isinstance(job, ExistsJob):
                continue
            pages = set(job.pages._ids)  # type: ignore[attr-defined]
            if pages & free:
                raise InvariantBroken(
                    f"own until drained: job {job.job_id} ({type(job).__name__}) names host pages "
                    f"{sorted(pages & free)}, which are free"
                )
            if pages & filled or (isinstance(job, ReadJob) and pages & read):
                raise InvariantBroken(f"one owner: job {job.job_id} and another name one page")
            (filled if isinstance(job, ReadJob) else read).update(pages)


def check_ranks_agree(engines: Sequence[Engine]) -> None:
    """All ranks have the same tree: structure, copies, locks, what storage is believed to have."""
    if len(engines) == 1:
        return
    first = snapshot(engines[0].cache)
    for rank, engine in enumerate(engines[1:], 1):
        mine = snapshot(engine.cache)
        if mine != first:
            differ = [pair for pair in zip(first, mine, strict=False) if pair[0] != pair[1]]
            raise InvariantBroken(
                f"ranks agree: rank 0 has {len(first)} nodes, rank {rank} has {len(mine)}; the "
                f"first that differ: {differ[:1]}"
            )


def snapshot(cache: Controller) -> Snapshot:
    """What must be equal on all ranks, node by node."""
    return sorted(
        (
            node.depth_pages,
            bytes(node.tokens),
            _seed(node),
            node.on_device,
            node.device_pending,
            node.host_pages is not None,
            node.host_pending,
            node.lock_count,
            node.host_lock_count,
            node.hit_count,
            node.stored_in,
            node.received.value,
        )
        for node in cache.parts.tree.nodes()
    )


def _seed(node: Node) -> bytes:
    at = node
    while at.parent is not None:
        at = at.parent
    return at.key
