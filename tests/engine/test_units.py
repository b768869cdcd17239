"""The units of a running sequence: what it holds of windows and states, and for how long."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import pytest

from hicache_core.engine.page_table import PageTable
from hicache_core.engine.units import SequenceUnits
from hicache_core.kv.keys import pack_tokens
from hicache_core.types import Namespace
from tests.page_path.grouped_world import MAMBA, PAGE_SIZE, SWA, GroupedWorld, make_grouped_world

SWA_AT, MAMBA_AT = 0, 1
N_UNITS = 32
INTERVAL = 16


@pytest.fixture
def world() -> Iterator[GroupedWorld]:
    world = make_grouped_world(n_units=N_UNITS)
    yield world
    assert world.cache.flush(10.0)
    world.cache.check_integrity()
    world.close()


def table_of(world: GroupedWorld) -> PageTable:
    units = SequenceUnits(world.cache, (SWA, MAMBA), INTERVAL)
    return PageTable(world.cache, Namespace(), 0, units)


def begun(world: GroupedWorld, tokens: range) -> tuple[PageTable, int]:
    """A table over what the cache has of all tokens but the last, and how many these are."""
    table = table_of(world)
    match = world.cache.match_prefix(pack_tokens(tokens[:-1]))
    world.cache.lock(match.node)
    loaded = world.cache.load_back(match)
    for layer in range(world.pool.spec.num_layers):
        world.cache.wait_layer(layer)
    table.begin(loaded.node, loaded.device_pages, array("i"))
    table.units.begin(loaded, len(tokens))
    table.extend(len(tokens))
    return table, loaded.n_tokens


def compute(table: PageTable, tokens: range, n_computed: int, copied: list[int]) -> None:
    """Computes a prompt in the forwards that the table wants, without a model."""
    while n_computed < len(tokens):
        stop = table.units.next_stop(n_computed)
        assert stop is not None
        n_computed = min(stop, len(tokens))
        table.units.extend(n_computed)
        table.units.computed(n_computed, lambda _from, to: copied.append(to))
        table.store(tokens[:n_computed], keep_end=n_computed == len(tokens))
        table.units.leave(n_computed)


def compute_part(table: PageTable, tokens: range, n_tokens: int) -> None:
    """Computes the first ``n_tokens`` of a prompt at once, as a part that the rest follows."""
    table.units.extend(n_tokens)
    table.units.computed(n_tokens, lambda _from, _to: None)
    table.store(tokens[:n_tokens], keep_end=False)
    table.units.leave(n_tokens)


def n_free(world: GroupedWorld, group: int) -> int:
    return world.pool.groups[group].allocator.n_free


def n_on_host(world: GroupedWorld, tokens: range) -> int:
    """Units of the window that only the host has of a prefix, all of which is found."""
    match = world.cache.match_prefix(pack_tokens(tokens), touch=False)
    assert match.n_tokens == len(tokens)
    return match.groups[SWA_AT].n_on_host


def test_a_prompt_keeps_the_pages_of_its_window_and_gives_the_others_back(
    world: GroupedWorld,
) -> None:
    tokens = range(41)
    table, _ = begun(world, tokens)
    compute(table, tokens, 0, [])
    (window,) = table.units.held.windows
    assert window.first == (40 - SWA.window + 1) // PAGE_SIZE
    assert window.first + len(window.units) == -(-41 // PAGE_SIZE)
    n_others = N_UNITS - len(window.units)
    world.cache.free_units(SWA_AT, world.cache.allocate_units(SWA_AT, n_others))
    n_before = n_free(world, SWA_AT)
    table.release()
    assert n_free(world, SWA_AT) == n_before + 1, "its last page was not whole"


def test_pages_that_a_window_has_passed_leave_the_device_once_the_host_has_them(
    world: GroupedWorld,
) -> None:
    """The ends of the parts of a prompt among them; the end of the prompt stays."""
    tokens = range(128)
    table, _ = begun(world, tokens)
    for n_tokens in range(INTERVAL, 128, INTERVAL):
        compute_part(table, tokens, n_tokens)
        assert world.cache.flush(10.0)
        (window,) = table.units.held.windows
        assert window.first == (n_tokens - SWA.window + 1) // PAGE_SIZE
        assert n_free(world, SWA_AT) == N_UNITS - len(window.units)
        world.cache.check_integrity()
    compute(table, tokens, 112, [])
    table.release()
    assert world.cache.flush(10.0)
    assert n_on_host(world, tokens) == 0
    assert n_on_host(world, tokens[:64]) > 0
    assert n_free(world, SWA_AT) == N_UNITS - (32 - SWA.first_needed(32, PAGE_SIZE))


def test_the_end_of_a_part_stays_if_another_request_goes_on_from_it(world: GroupedWorld) -> None:
    tokens = range(64)
    table, _ = begun(world, tokens)
    compute_part(table, tokens, INTERVAL)
    other, n_found = begun(world, range(INTERVAL + 1))
    assert n_found == INTERVAL
    compute(table, tokens, INTERVAL, [])
    assert world.cache.flush(10.0)
    assert n_on_host(world, tokens[:INTERVAL]) == 0
    table.release()
    other.release()
    assert n_on_host(world, tokens[:INTERVAL]) == 0, "and the next one may, too"


@pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
def test_a_request_that_ends_with_a_part_keeps_the_window_there(policy: str) -> None:
    """It was aborted, or preempted and goes on from there."""
    world = make_grouped_world(n_units=N_UNITS, hicache_write_policy=policy)
    tokens = range(64)
    table, _ = begun(world, tokens)
    compute_part(table, tokens, INTERVAL)
    table.store(tokens[:INTERVAL])
    table.release()
    assert world.cache.flush(10.0)
    assert n_on_host(world, tokens[:INTERVAL]) == 0
    world.close()


def test_what_leaves_with_its_lock_is_copied_first_under_write_back() -> None:
    """A request that fails stores nothing more; what it stored before is not lost."""
    world = make_grouped_world(n_units=N_UNITS, hicache_write_policy="write_back")
    tokens = range(64)
    table, _ = begun(world, tokens)
    compute_part(table, tokens, INTERVAL)
    assert n_on_host(world, tokens[:INTERVAL]) == 0
    table.release()
    assert world.cache.flush(10.0)
    assert n_free(world, SWA_AT) == N_UNITS
    assert n_on_host(world, tokens[:INTERVAL]) > 0
    world.close()


def test_what_leaves_the_window_of_an_answer_is_free_at_once(world: GroupedWorld) -> None:
    table, _ = begun(world, range(9))
    compute(table, range(9), 0, [])
    most = 0
    for n_tokens in range(10, 60):
        table.extend(n_tokens)
        table.units.extend(n_tokens)
        most = max(most, N_UNITS - n_free(world, SWA_AT))
        table.units.computed(n_tokens, lambda _from, _to: None)
        table.units.leave(n_tokens)
    assert most <= 2 + SWA.window // PAGE_SIZE + 2, "two of the prompt, kept by its lock"
    table.store(range(59))
    table.release()
    match = world.cache.match_prefix(pack_tokens(range(59)))
    assert match.n_tokens == 56, "the last boundary has its window, and its snapshot"


def test_snapshots_are_at_the_end_of_the_prompt_and_at_each_interval(world: GroupedWorld) -> None:
    tokens = range(41)
    table, _ = begun(world, tokens)
    compute(table, tokens, 0, [])
    table.release()
    for n_tokens in range(4, 44, PAGE_SIZE):
        match = world.cache.match_prefix(pack_tokens(tokens[:n_tokens]), touch=False)
        if n_tokens in (16, 32, 40):
            assert match.n_tokens == n_tokens
        else:
            assert match.n_tokens < n_tokens
            assert match.cut_by == MAMBA.name


def test_a_branch_that_the_tree_finds_gets_a_snapshot(world: GroupedWorld) -> None:
    """So a third prompt that parts there, too, goes on from the branch."""
    shared = list(range(12))
    prompts = [pack_tokens([*shared, *range(n, n + 12)]) for n in (100, 200, 300)]
    n_cached = []
    for prompt in prompts:
        tokens = memoryview(prompt).cast("I").tolist()
        table, n_found = begun(world, tokens)  # type: ignore[arg-type]
        n_cached.append(n_found)
        compute(table, tokens, n_found, [])  # type: ignore[arg-type]
        table.release()
    assert n_cached == [0, 0, 12]


def test_a_snapshot_in_the_tree_is_never_written(world: GroupedWorld) -> None:
    tokens = range(41)
    table, _ = begun(world, tokens)
    compute(table, tokens, 0, [])
    table.release()
    again, n_found = begun(world, range(61))
    assert n_found == 40
    held = again.units.held
    again.units.extend(n_found + 1)
    assert again.units.held.state_from == held.state_from
    written = {again.units.held.state_to}
    copied: list[int] = []
    compute(again, range(61), n_found, copied)
    assert held.state_from not in written | set(copied)
    again.release()


def test_without_room_for_a_snapshot_the_request_goes_on_without(world: GroupedWorld) -> None:
    tokens = range(41)
    table, _ = begun(world, tokens)
    table.units.extend(1)
    taken = world.cache.allocate_units(MAMBA_AT, n_free(world, MAMBA_AT))
    compute(table, tokens, 0, [])
    table.release()
    world.cache.free_units(MAMBA_AT, taken)
    assert world.cache.match_prefix(pack_tokens(tokens)).n_tokens == 0
