"""What a store does wrong with units of windows and states costs hits, never a wrong byte."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hicache_core.kv.keys import PageKeys, pack_tokens
from tests.page_path import backends
from tests.page_path.grouped_world import MIXES, PAGE_SIZE, GroupedWorld, make_grouped_world

GROUPED = [(mix, group.name) for mix, spec in MIXES.items() for group in spec.groups]
every_group = pytest.mark.parametrize(("mix", "group"), GROUPED)

N_TOKENS = 40
"""Ten pages: the window needs the last two, snapshots are after 3, 6, 9 and 10 pages."""

Make = Callable[..., GroupedWorld]


@pytest.fixture
def on() -> Iterator[Make]:
    """Makes worlds on a class of ``backends``, all over one store; closes and checks them."""
    backends.reset()
    made: list[GroupedWorld] = []

    def make(mix: str, backend: type[Any], **settings: Any) -> GroupedWorld:
        storage = {
            "backend_name": backend.name,
            "module_path": "tests.page_path.backends",
            "class_name": backend.__name__,
        }
        made.append(make_grouped_world(mix, storage=storage, backend="dynamic", **settings))
        return made[-1]

    yield make
    backends.open_gates()
    for world in made:
        world.close()
    backends.reset()


def stored(on: Make, mix: str) -> None:
    """Fills the store with the prompt."""
    world = on(mix, backends.Store)
    world.request(range(N_TOKENS))
    assert world.cache.flush(10.0)


def keys_of(world: GroupedWorld, group: str) -> list[str]:
    """Keys of the units of a group that the store has, by page."""
    names = [each.name for each in world.pool.spec.groups]
    storage = world.cache.parts.storage
    assert storage is not None
    assert storage.current is not None
    namespace = storage.current.group_namespaces[names.index(group)]
    keys = PageKeys(namespace, pack_tokens(range(N_TOKENS)), PAGE_SIZE, b"")
    return [key for key in keys if key in backends.Store.objects]


@every_group
def test_a_unit_that_is_gone_makes_the_hit_end_before_it(on: Make, mix: str, group: str) -> None:
    """Nine pages need no unit of the last, and have a snapshot."""
    stored(on, mix)
    world = on(mix, backends.Store)
    del backends.Store.objects[keys_of(world, group)[-1]]
    outcome = world.request(range(N_TOKENS + 4))
    assert (outcome.n_tokens, outcome.storage) == (36, 36)


@every_group
def test_a_unit_that_vanishes_between_the_question_and_the_read_is_no_hit(
    on: Make, mix: str, group: str
) -> None:
    stored(on, mix)
    world = on(mix, backends.Forgets)
    backends.Forgets.forgotten.add(keys_of(world, group)[-1])
    outcome = world.request(range(N_TOKENS + 4))
    assert outcome.n_tokens < N_TOKENS
    explanation = world.cache.explain("request-1")
    assert explanation is not None
    assert explanation.reason.value == "vanished"


@every_group
@pytest.mark.parametrize("damage", ["a flipped bit", "a byte less", "the bytes of another page"])
def test_a_damaged_unit_is_no_hit_and_the_seal_says_so(
    on: Make, mix: str, group: str, damage: str
) -> None:
    stored(on, mix)
    world = on(mix, backends.Store)
    *before, key = keys_of(world, group)
    value = bytearray(backends.Store.objects[key])
    if damage == "a flipped bit":
        value[-1] ^= 1
    elif damage == "a byte less":
        del value[-1:]
    else:
        value[:] = backends.Store.objects[before[-1]]
    backends.Store.objects[key] = bytes(value)
    outcome = world.request(range(N_TOKENS + 4))
    assert outcome.n_tokens < N_TOKENS
    explanation = world.cache.explain("request-1")
    assert explanation is not None
    assert explanation.reason.value == "corrupt"


@every_group
def test_a_unit_that_was_damaged_is_stored_again_and_then_a_hit(
    on: Make, mix: str, group: str
) -> None:
    stored(on, mix)
    world = on(mix, backends.Store)
    key = keys_of(world, group)[-1]
    right = backends.Store.objects[key]
    backends.Store.objects[key] = right[:-1]
    world.request(range(N_TOKENS + 4))
    world.request(range(N_TOKENS))  # a snapshot is kept where a prompt ends
    assert world.cache.flush(10.0)
    assert backends.Store.objects[key] == right
    again = on(mix, backends.Store)
    assert again.request(range(N_TOKENS + 4)).n_tokens == N_TOKENS


@pytest.mark.parametrize("mix", MIXES)
def test_units_that_are_late_are_hits_of_a_later_request(on: Make, mix: str) -> None:
    """A request gives up waiting; what it had asked for arrives afterwards."""
    stored(on, mix)
    world = on(mix, backends.Gated)
    tokens = pack_tokens(range(N_TOKENS + 4))
    assert world.cache.prefetch("r", tokens)
    while not backends.Gated.entered.acquire(timeout=0.01):
        world.cache.poll()
    assert world.cache.finish_prefetch("r") == 0
    world.check()
    assert world.cache.match_prefix(tokens).n_tokens == 0
    backends.open_gates()
    for _ in range(1000):
        if world.cache._reads_idle:
            break
        world.cache.wait(0.01)
        world.cache.poll()
        world.check()
    assert world.request(range(N_TOKENS + 4)).n_tokens == N_TOKENS


@pytest.mark.parametrize("mix", MIXES)
def test_a_store_that_fails_in_every_way_costs_only_its_hits(on: Make, mix: str) -> None:
    stored(on, mix)
    for backend in (backends.Raises, backends.RaisesOnRead, backends.RaisesOnWrite):
        world = on(mix, backend)
        first = world.request(range(N_TOKENS))
        assert first.n_tokens == (36 if backend is backends.RaisesOnWrite else 0)
        world.cache.flush(10.0)
        world.flush_device()
        outcome = world.request(range(N_TOKENS + 4))
        assert (outcome.n_tokens, outcome.storage) == (N_TOKENS, 0), "the host has all of it"


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
@pytest.mark.parametrize("io_backend", ["kernel", "direct"])
def test_every_layout_and_io_backend_keeps_units_as_they_are(
    on: Make, layout: str, io_backend: str
) -> None:
    if (layout, io_backend) in {("page_first", "direct"), ("page_first_direct", "kernel")}:
        pytest.skip("the settings say that this layout works with the other io backend only")
    settings = {"hicache_mem_layout": layout, "hicache_io_backend": io_backend}
    mix = "full, window and state"
    first = on(mix, backends.Store, **settings)
    first.request(range(N_TOKENS))
    assert first.cache.flush(10.0)
    first.flush_device()
    assert first.request(range(N_TOKENS + 4)).n_loaded > 0
    assert first.cache.flush(10.0)
    again = on(mix, backends.Store, **settings)
    outcome = again.request(range(N_TOKENS + 8))
    assert (outcome.n_tokens, outcome.storage) == (N_TOKENS + 4, N_TOKENS + 4)


@pytest.mark.parametrize("backend", ["memory", "file"])
def test_units_come_back_from_every_kind_of_store(tmp_path: Path, backend: str) -> None:
    """As from Redis in ``tests/end_to_end/test_groups_on_redis.py``."""
    settings = {"memory": {"share": uuid.uuid4().hex}, "file": {"path": str(tmp_path)}}[backend]
    mix = "full, window and state"
    first = make_grouped_world(mix, backend=backend, storage=settings)
    first.request(range(N_TOKENS))
    assert first.cache.flush(10.0)
    second = make_grouped_world(mix, backend=backend, storage=settings)
    outcome = second.request(range(N_TOKENS + 4))
    assert (outcome.n_tokens, outcome.storage) == (N_TOKENS, N_TOKENS)
    first.close()
    second.close()
