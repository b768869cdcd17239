"""The invariants that are checked after each step, beside those that the controller checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hicache_core.controller.controller import Controller
from hicache_core.controller.parts import GroupParts
from hicache_core.radix.holdings import Holdings
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
    check_unit_owners(engine)
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


def check_unit_owners(engine: Engine) -> None:
    """As ``check_device_owners``, for the units of each group; the host has no other owners."""
    for at, part in enumerate(engine.cache.parts.groups):
        name, pinned = part.held.group.name, part.held.device
        owned = [unit for holding in part.held._held.values() for unit in holding.device or ()]
        held = [request.units[at] for request in engine.requests.values() if request.units]
        lost = {unit for mine in held for unit in mine.shared.values()}.difference(owned)
        if lost:
            raise InvariantBroken(f"locked: units {lost} of {name} were shared, and have gone")
        owned += [unit for mine in held for unit in mine.own.values()]
        if len(set(owned)) != len(owned) or pinned._let_go & set(owned):
            raise InvariantBroken(f"one owner: units of {name} on the device have two")
        if len(owned) + pinned.n_let_go + pinned.n_free != pinned.n_units:
            raise InvariantBroken(
                f"free + cached + in flight = total: {pinned.n_free} units of {name} are free, "
                f"{len(owned)} have an owner, {pinned.n_let_go} are let go, of {pinned.n_units}"
            )
        check_units_on_their_way(engine.cache, part)


def check_units_on_their_way(cache: Controller, part: GroupParts) -> None:
    """What a copy or a store reads or fills is not free."""
    paths, host = cache._group_paths, part.held.host
    assert host is not None
    stores = [set(it.units) for it in paths._stores if it.group is part]
    loads = [it for it in paths._loads if it.group is part]
    read = set[int]().union(*stores, *(load.host_units for load in loads))
    filled = set[int]().union(*(load.device_units for load in loads))
    for units, pinned in ((read, host), (filled, part.held.device)):
        if units.intersection(pinned._allocator._free):
            raise InvariantBroken(f"own until drained: of {part.held.group.name}, {units} are free")


def check_named_pages(cache: Controller, workers: Sequence[SimWorker]) -> None:
    """Bytes that an unfinished job names are not free, and no two jobs fill the same bytes."""
    hosts = [cache.parts.host, *(part.host for part in cache.parts.groups)]
    pools = {id(host._cutter): host for host in hosts if host is not None}
    free = {(id(memory), page) for memory, host in pools.items() for page in host.allocator._free}
    filled: set[tuple[int, int]] = set()
    read: set[tuple[int, int]] = set()
    for worker in workers:
        for job in worker.unfinished():
            if isinstance(job, ExistsJob):
                continue
            named = job.pages
            pages = {(id(named._cutter), page) for page in named._ids}  # type: ignore[attr-defined]
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
            tuple(_of_group(part.held, node) for part in cache.parts.groups),
        )
        for node in cache.parts.tree.nodes()
    )


def _of_group(held: Holdings, node: Node) -> tuple[object, ...]:
    holding, n_locks = held.get(node), held._locks.get(node, 0)
    if holding is None:
        return (n_locks,)
    device, host = holding.device is not None, holding.host is not None
    return n_locks, device, host, holding.stored_in, holding.is_copied, holding.leaves


def _seed(node: Node) -> bytes:
    at = node
    while at.parent is not None:
        at = at.parent
    return at.key
