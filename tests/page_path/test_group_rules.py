"""Units of groups on their way: failed copies, stores that hang, few units, resets and closes."""

from __future__ import annotations

import random
import uuid
from array import array
from collections.abc import Sequence

import pytest

from hicache_core.errors import LoadFailed, PoolExhausted
from hicache_core.kv.keys import pack_tokens
from hicache_core.kv.spec import GroupKind
from hicache_core.radix.results import LACKING, NewUnits
from tests.page_path import backends
from tests.page_path.grouped_world import (
    MIXES,
    N_LAYERS,
    PAGE_NBYTES,
    PAGE_SIZE,
    GroupedWorld,
    make_grouped_world,
)
from tests.page_path.test_failed_loads import AnotherRank

GROUPED = [mix for mix, spec in MIXES.items() if spec.groups]
grouped = pytest.mark.parametrize("mix", GROUPED)


def on_the_host(world: GroupedWorld, tokens: bytes) -> None:
    """A prompt whose units are on the host alone."""
    world.request(range(len(tokens) // 4))
    assert world.cache.flush(10.0)
    world.flush_device()


def settle_loads(world: GroupedWorld) -> None:
    while not world.cache.loads_settled:
        world.cache.wait(0.001)
        world.cache.poll()


@grouped
def test_a_load_of_units_that_fails_is_told_and_its_units_are_the_callers(mix: str) -> None:
    other = AnotherRank()
    world = make_grouped_world(mix, ranks=other)
    cache, tokens = world.cache, pack_tokens(range(40))
    on_the_host(world, tokens)
    other.fails = True
    match = cache.match_prefix(tokens)
    cache.lock(match.node)
    n_failed = cache.n_failed_loads
    loaded = cache.load_back(match)
    settle_loads(world)
    assert cache.n_failed_loads > n_failed
    with pytest.raises(LoadFailed):
        cache.wait_layer(0)
    for group, own in enumerate(loaded.own):
        cache.free_units(group, own)
    cache.unlock(match.node)
    other.fails = False
    settle_loads(world)
    while True:  # each failed copy is told once
        try:
            cache.wait_layer(0)
        except LoadFailed:
            continue
        break
    world.check()
    assert world.request(range(44)).n_tokens == 40
    world.close()


@grouped
def test_units_of_a_request_that_goes_away_while_they_are_loaded_are_not_lost(mix: str) -> None:
    world = make_grouped_world(mix)
    cache, tokens = world.cache, pack_tokens(range(40))
    on_the_host(world, tokens)
    match = cache.match_prefix(tokens)
    cache.lock(match.node)
    loaded = cache.load_back(match)
    for group, own in enumerate(loaded.own):
        cache.free_units(group, own)
    cache.unlock(match.node)
    world.check()
    settle_loads(world)
    world.check()
    for group, pool in enumerate(world.pool.groups):
        cache.free_units(group, cache.allocate_units(group, pool.n_pages))
    world.close()


def test_a_match_is_loaded_from_where_its_units_are_now() -> None:
    """Another request has brought them to the device since, and the host has let go of its own."""
    world = make_grouped_world("full and window")
    cache, tokens = world.cache, pack_tokens(range(40))
    world.request(range(40))
    assert cache.flush(10.0)
    cache.free_units(0, cache.allocate_units(0, world.pool.groups[0].n_pages))
    match = cache.match_prefix(tokens)
    assert match.groups[0].n_on_host == 2
    cache.lock(match.node)
    units = cache.allocate_units(0, 2)
    for page, unit in zip((8, 9), units, strict=True):
        world.write(world.pool.groups[0], tokens, page, unit, "swa")
    cache.insert(tokens, match.device_pages, groups=[[NewUnits(8, units)]])
    (part,) = cache.parts.groups
    assert part.host is not None
    taken = cache._group_paths.allocate_host(part, part.host.n_pages)
    assert len(taken) == part.host.n_pages
    part.host.buffers[0][:] = b"\xff" * part.host.nbytes
    loaded = cache.load_back(match)
    assert loaded.is_on_device
    world.check_match(tokens, loaded)
    assert part.held.host is not None
    part.held.host.free(taken)
    cache.unlock(match.node)
    world.close()


def test_write_back_copies_only_as_many_units_as_must_leave() -> None:
    world = make_grouped_world("full and window", n_units=12, hicache_write_policy="write_back")
    for start in (0, 100, 200):
        world.request(range(start, start + 4 * PAGE_SIZE))
    cache, (part,) = world.cache, world.cache.parts.groups
    assert part.held.n_device_units >= 6
    assert cache.flush(10.0)
    n_free, n_before = part.held.device.n_free, part.held.n_host_units
    cache.free_units(0, cache.allocate_units(0, n_free + 2))
    assert cache.flush(10.0)
    assert part.held.n_host_units == n_before + 2
    world.check()
    world.close()


def test_what_a_shorter_prefix_needs_does_not_leave_with_the_longer_one() -> None:
    """Units outside the window of a prompt leave the device; one that ends among them keeps its."""
    world = make_grouped_world("full and window", hicache_write_policy="write_back")
    (part,) = world.cache.parts.groups
    tokens = pack_tokens(range(40))
    pages = world.cache.allocate(10)
    units = world.cache.allocate_units(0, 10)
    for page in range(10):
        world.write(world.pool, tokens, page, pages[page], "kv")
        world.write(world.pool.groups[0], tokens, page, units[page], "swa")
    world.cache.insert(tokens, pages, groups=[[NewUnits(0, units)]])
    leaving = [node for node in part.held.nodes() if part.held.get(node).leaves]  # type: ignore[union-attr]
    assert sum(node.n_pages for node in leaving) == 8, "their copies run"
    short = world.cache.match_prefix(tokens[: 5 * PAGE_NBYTES])
    assert short.n_tokens == 20
    world.cache.lock(short.node)
    assert world.cache.flush(10.0)
    world.cache.unlock(short.node)
    world.cache.insert(tokens[: 5 * PAGE_NBYTES], pages[:5])
    again = world.cache.match_prefix(tokens[: 5 * PAGE_NBYTES])
    assert again.n_tokens == 20
    assert LACKING not in again.groups[0].device
    world.check_match(tokens, again)
    world.close()


def test_fewer_pages_than_storage_has_end_where_every_group_has_what_it_needs() -> None:
    """An admission policy wants 7 of 10 pages; the last snapshot before is that of page 6."""
    world = make_grouped_world("full and state", storage={"share": uuid.uuid4().hex})
    tokens = pack_tokens(range(40))
    storage, reads = world.cache.parts.storage, world.cache._prefetch_path
    assert storage is not None
    assert storage.current is not None
    assert reads is not None
    root = world.cache.match_prefix(tokens).node
    question = reads._units.question(tokens, b"", root, 0, storage.current)
    snapshots = {2, 5, 8, 9}
    mask = [True] * 10 + [page in snapshots for page in range(10)]
    assert len(question.keys) == len(mask)
    assert [question.n_more(mask, most)[0] for most in (None, 10, 9, 8, 7, 3, 2)] == [
        10,
        10,
        9,
        6,
        6,
        3,
        0,
    ]
    world.close()


@grouped
def test_reset_waits_for_stores_of_units(mix: str) -> None:
    backends.reset()
    storage = {
        "backend_name": "gated_writes",
        "module_path": "tests.page_path.backends",
        "class_name": "GatedWrites",
    }
    world = make_grouped_world(mix, backend="dynamic", storage=storage)
    world.request(range(40))
    assert not world.cache.flush(0.2)
    assert not world.cache.reset()
    world.check()
    backends.open_gates()
    assert world.cache.flush(10.0)
    assert world.cache.reset()
    world.check()
    for part, pool in zip(world.cache.parts.groups, world.pool.groups, strict=True):
        assert (part.held.device.n_free, part.held.n_host_units) == (pool.n_pages, 0)
    assert world.request(range(44)).n_tokens in (0, 40)  # from storage, or computed
    world.close()
    backends.reset()


@grouped
@pytest.mark.parametrize("gated", [backends.Gated, backends.GatedQuestions, backends.GatedWrites])
def test_close_ends_with_units_on_their_way(
    mix: str, gated: type[backends.Store], caplog: pytest.LogCaptureFixture
) -> None:
    """Calls that hang are abandoned, and end when the store answers."""
    backends.reset()
    by_class = {
        kind: {
            "backend_name": kind.name,
            "module_path": "tests.page_path.backends",
            "class_name": kind.__name__,
        }
        for kind in (backends.Store, gated)
    }
    first = make_grouped_world(mix, backend="dynamic", storage=by_class[backends.Store])
    first.request(range(40))
    first.close()
    world = make_grouped_world(mix, backend="dynamic", storage=by_class[gated])
    world.cache.prefetch("r", pack_tokens(range(100, 140)))
    world.cache.prefetch("s", pack_tokens(range(44)))
    for _ in range(3):
        world.cache.wait(0.02)
        world.cache.poll()
    if gated is backends.GatedWrites:
        world.cache.finish_prefetch("s")
        world.compute(pack_tokens(range(200, 240)), world.cache.match_prefix([]))
    world.check()
    world.cache.close(0.1)
    world.cache.close()
    backends.open_gates()
    caplog.clear()


@grouped
@pytest.mark.parametrize("n_units", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
def test_with_few_units_every_request_is_served(mix: str, n_units: int, policy: str) -> None:
    """A prompt is computed page by page. Where there is no unit it goes on without: its KV is
    computed again by whoever asks for it next."""
    draw = random.Random(f"{mix} {n_units} {policy}")
    world = make_grouped_world(
        mix,
        device_pages=12,
        n_units=n_units,
        storage={"share": uuid.uuid4().hex},
        hicache_ratio=1.0,
        hicache_write_policy=policy,
        batch_pages=1,
    )
    others: list[str] = []
    for n in range(25):
        ids = [*range(draw.choice((8, 16, 24))), *[7] * draw.choice((0, 4))]
        if draw.random() < 0.4 and world.cache.prefetch(f"other-{n}", ids):
            others.append(f"other-{n}")
        by_page(world, ids)
        while len(others) > 2:
            world.cache.finish_prefetch(others.pop(0))
    for other in others:
        world.cache.finish_prefetch(other)
    world.close()


def by_page(world: GroupedWorld, ids: Sequence[int]) -> None:
    """A request that gives the tree each page, and its units, as they are computed."""
    cache, tokens = world.cache, pack_tokens(ids)
    match = cache.match_prefix(tokens)
    cache.lock(match.node)
    loaded = cache.load_back(match)
    cache.lock(loaded.node)
    cache.unlock(match.node)
    for layer in range(N_LAYERS):
        cache.wait_layer(layer)
    world.check_match(tokens, loaded)
    settle_loads(world)
    for group, own in enumerate(loaded.own):
        cache.free_units(group, own)
    pages, node = loaded.device_pages[:], loaded.node
    for page in range(len(pages), len(tokens) // PAGE_NBYTES):
        pages += cache.allocate(1)
        world.write(world.pool, tokens, page, pages[page], "kv")
        runs = [unit_of(world, tokens, group, page) for group in range(len(world.pool.groups))]
        result = cache.insert(tokens[: (page + 1) * PAGE_NBYTES], pages, groups=runs)
        cache.lock(result.node)
        cache.unlock(node)
        cache.free(result.duplicates)
        for group, duplicates in enumerate(result.unit_duplicates):
            cache.free_units(group, duplicates)
        pages, node = result.pages, result.node
        cache.poll()
        world.check()
    cache.unlock(node)


def unit_of(world: GroupedWorld, tokens: bytes, group: int, page: int) -> list[NewUnits]:
    """The unit of a page, if there is room for it; of a state, of every second page."""
    kind = world.pool.spec.groups[group]
    if kind.kind is GroupKind.STATE and page % 2:
        return []
    try:
        units = world.cache.allocate_units(group, 1)
    except PoolExhausted:
        return []
    world.write(world.pool.groups[group], tokens, page, units[0], kind.name)
    return [NewUnits(page, array("i", units))]
