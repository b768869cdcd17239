"""Pages that another node computed are written only as far as storage lacks them."""

from __future__ import annotations

from typing import Any

import pytest

from hicache_core.kv.keys import pack_tokens
from tests.page_path import backends
from tests.page_path.test_storage_faults import on, stored
from tests.page_path.world import PAGE_SIZE, SPEC, World, ids

FREE: dict[str, Any] = {"hicache_host_retention": "free_once_stored"}


def receive(world: World, n_tokens: int) -> None:
    """As if the whole pages of a prompt had come from another node."""
    tokens = pack_tokens(ids(n_tokens))
    pages = world.cache.allocate(n_tokens // PAGE_SIZE)
    for layer in range(SPEC.num_layers):
        world.compute_layer(tokens, pages, 0, layer)
    world.cache.free(world.cache.insert_received(tokens, pages, world.salt).duplicates)
    world.check()


def on_counts(worlds: list[World], **settings: Any) -> World:
    """A world on a store that counts."""
    return on(worlds, backends.Counts, **settings)


@pytest.mark.parametrize("n_stored", [0, 12, 32])
def test_only_what_storage_lacks_is_written(worlds: list[World], n_stored: int) -> None:
    if n_stored:
        stored(worlds, n_stored + 1)
    world = on_counts(worlds)
    receive(world, 32)
    backends.Counts.gate.set()
    world.request(ids(41), prefetch=False)
    assert world.cache.flush(10.0)
    assert backends.Counts.n_written == (40 - n_stored) // PAGE_SIZE
    assert backends.Counts.n_asked == 1
    assert world.cache.counters.store_skipped_pages == n_stored // PAGE_SIZE
    world.flush_device()
    assert world.request(ids(41), prefetch=False).host == 40, "the host is a cache of its own"


def test_what_storage_has_never_goes_to_a_host_that_keeps_nothing(worlds: list[World]) -> None:
    stored(worlds)
    world = on_counts(worlds, **FREE)
    receive(world, 32)
    backends.Counts.gate.set()
    world.request(ids(41), prefetch=False)
    assert world.cache.flush(10.0)
    assert world.cache.counters.backup_tokens == 8


def test_new_pages_do_not_wait_for_the_answer(worlds: list[World]) -> None:
    world = on_counts(worlds)
    receive(world, 32)
    world.request(ids(41), prefetch=False)
    while world.cache.counters.stored_pages < 2:
        world.cache.wait(1.0)
        world.cache.poll()
    assert world.cache.counters.backup_tokens == 8, "those behind the received ones alone"
    world.request(ids(41), prefetch=False)
    assert backends.Counts.n_asked == 1
    backends.Counts.gate.set()
    assert world.cache.flush(10.0)
    assert world.cache.counters.backup_tokens == 40


def test_pages_that_are_computed_here_cost_no_question(worlds: list[World]) -> None:
    world = on_counts(worlds)
    world.request(ids(33), prefetch=False)
    assert world.cache.flush(10.0)
    assert (backends.Counts.n_asked, backends.Counts.n_written) == (0, 8)


def test_an_answer_that_does_not_come_keeps_no_page(worlds: list[World]) -> None:
    world = on_counts(worlds)
    receive(world, 32)
    world.request(ids(33), prefetch=False)
    assert world.flush_device() == 8
    world.check()
    assert world.cache.match_prefix(ids(33), touch=False).n_tokens == 0
    receive(world, 16)
    backends.Counts.gate.set()
    assert world.cache.flush(10.0)
    world.request(ids(33), prefetch=False)
    assert world.cache.flush(10.0)
    assert backends.Counts.n_written == 8


def test_the_answer_of_a_backend_that_was_detached_counts_for_nothing(
    worlds: list[World],
) -> None:
    stored(worlds)
    world = on_counts(worlds)
    receive(world, 32)
    world.request(ids(33), prefetch=False)
    world.cache.detach_storage()
    backends.Counts.gate.set()
    assert world.cache.flush(10.0)
    assert world.cache.counters.store_skipped_pages == 0
    world.check()


def test_an_answer_from_before_the_store_was_cleared_counts_for_nothing(
    worlds: list[World],
) -> None:
    stored(worlds)
    world = on_counts(worlds)
    receive(world, 32)
    world.request(ids(33), prefetch=False)
    assert backends.Counts.looked.wait(10.0)
    clearing = world.cache.clear_storage()
    while not clearing.done:
        world.cache.poll()
    assert clearing.n_objects >= 8
    backends.Counts.gate.set()
    assert world.cache.flush(10.0)
    assert world.cache.counters.store_skipped_pages == 0
    assert backends.Counts.n_written == 8


def test_a_host_with_little_room_changes_nothing_about_the_question(worlds: list[World]) -> None:
    """Nodes above are split while they are copied, for want of room, before storage is asked."""
    stored(worlds, 49)
    world = on_counts(worlds, device_pages=32, ratio=3 / 32)
    backends.Counts.gate.set()
    world.request(ids(33), prefetch=False)
    receive(world, 48)
    world.request(ids(49), prefetch=False)
    assert world.cache.flush(10.0)
    world.check()
    assert world.cache.counters.store_skipped_pages == 4
