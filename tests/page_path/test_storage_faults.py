"""What a storage backend does wrong costs hits, never a wrong byte, a hang or a page."""

from __future__ import annotations

from typing import Any

import pytest

from tests.page_path import backends
from tests.page_path.world import Outcome, World, ids, make_world


def on(worlds: list[World], backend: type[backends.Store] | type[Any], **settings: Any) -> World:
    """A world on a class of ``backends``."""
    storage = {
        "backend_name": backend.name,
        "module_path": "tests.page_path.backends",
        "class_name": backend.__name__,
    }
    storage |= settings.pop("keys", {})
    world = make_world(storage=storage, backend="dynamic", **settings)
    worlds.append(world)
    return world


def stored(worlds: list[World], n_tokens: int = 33) -> None:
    """Fills the store with a prefix."""
    world = on(worlds, backends.Store)
    world.request(ids(n_tokens))
    assert world.cache.flush(10.0)


@pytest.mark.parametrize("n_kept", [0, 1, 7, 8])
def test_pages_evicted_between_exists_and_get_are_a_shorter_hit(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch, n_kept: int
) -> None:
    stored(worlds)
    monkeypatch.setattr(backends.EvictsBeforeRead, "n_kept", n_kept)
    world = on(worlds, backends.EvictsBeforeRead)
    outcome = world.request(ids(33))
    assert outcome == Outcome(0, 4 * n_kept, 4 * n_kept, computed_pages=8 - n_kept)
    assert world.cache.counters.prefetch_failed_pages == 8 - n_kept


def test_flipped_bits_are_a_miss(worlds: list[World]) -> None:
    stored(worlds)
    world = on(worlds, backends.Flips)
    assert world.request(ids(33)).storage < 32  # and World checked every byte that was served


def test_pages_that_a_backend_only_says_it_has_filled_are_read_once_more(
    worlds: list[World],
) -> None:
    stored(worlds)
    world = on(worlds, backends.Lies)
    assert world.request(ids(33)) == Outcome(0, 32, 32, computed_pages=0)


@pytest.mark.parametrize("backend", [backends.Raises, backends.RaisesOnRead])
def test_a_backend_that_fails_in_every_way_costs_only_its_hits(
    worlds: list[World], backend: type[Any]
) -> None:
    stored(worlds)
    world = on(worlds, backend)
    assert world.request(ids(33)) == Outcome(0, 0, 0, computed_pages=8)
    assert world.cache.flush(10.0)
    assert world.request(ids(33)).device == 32
    world.flush_device()
    assert world.request(ids(33)).host == 32


def test_a_truncated_object_is_a_miss(worlds: list[World]) -> None:
    stored(worlds)
    keys = sorted(backends.Store.objects)
    for key in keys:
        backends.Store.objects[key] = backends.Store.objects[key][:-1]
    assert on(worlds, backends.Store).request(ids(33)) == Outcome(0, 0, 0, computed_pages=8)


def test_an_object_under_a_foreign_key_is_a_miss(worlds: list[World]) -> None:
    """Every key holds the bytes of its neighbour: right size, right checksum, wrong page."""
    stored(worlds)
    keys = sorted(backends.Store.objects)
    values = [backends.Store.objects[key] for key in keys]
    for key, value in zip(keys, values[1:] + values[:1], strict=True):
        backends.Store.objects[key] = value
    assert on(worlds, backends.Store).request(ids(33)) == Outcome(0, 0, 0, computed_pages=8)


def test_best_effort_runs_at_once_and_late_pages_serve_the_next_request(
    worlds: list[World],
) -> None:
    stored(worlds)
    world = on(worlds, backends.Gated, hicache_storage_prefetch_policy="best_effort")
    assert world.cache.prefetch("r1", ids(33))
    _until_reading(world)
    assert world.cache.prefetch_ready("r1")
    assert world.cache.finish_prefetch("r1") == 0
    assert world.cache.match_prefix(ids(33)).n_tokens == 0
    world.check()
    backends.Gated.gate.release(8)
    _until(world, lambda: world.cache.match_prefix(ids(33), touch=False).n_tokens == 32)
    assert world.request(ids(33)).host == 32


def test_wait_complete_never_runs_before_storage_is_done(worlds: list[World]) -> None:
    stored(worlds)
    world = on(worlds, backends.Gated)
    assert world.cache.prefetch("r1", ids(33))
    _until_reading(world)
    for _ in range(50):
        world.cache.poll()
        assert not world.cache.prefetch_ready("r1")
    backends.Gated.gate.release(8)
    world.wait_for_prefetch("r1")
    assert world.cache.finish_prefetch("r1") == 32


def test_timeout_runs_when_the_time_is_over(worlds: list[World]) -> None:
    """base + per 1,024 tokens, counted from the first time that the scheduler asked."""
    stored(worlds)
    now = [100.0]
    keys = {"prefetch_timeout_base": 1.0, "prefetch_timeout_per_ki_token": 32.0}
    world = on(
        worlds,
        backends.Gated,
        keys=keys,
        hicache_storage_prefetch_policy="timeout",
        clock=lambda: now[0],
    )
    assert world.cache.prefetch("r1", ids(33))
    now[0] = 150.0  # waiting in the queue costs nothing
    assert not world.cache.prefetch_ready("r1")
    now[0] = 151.9
    assert not world.cache.prefetch_ready("r1")
    now[0] = 152.1  # 1 s + 32 tokens / 1024 * 32 s
    world.cache.poll()
    assert world.cache.prefetch_ready("r1")
    backends.Gated.gate.release(8)


def test_a_request_that_gives_up_takes_the_leading_batches_that_have_arrived(
    worlds: list[World],
) -> None:
    stored(worlds)
    world = on(
        worlds,
        backends.Gated,
        batch_pages=2,
        hicache_storage_threads=1,
        hicache_storage_prefetch_policy="best_effort",
    )
    assert world.cache.prefetch("r1", ids(33))
    _until_reading(world)
    backends.Gated.gate.release(2)
    assert backends.Gated.entered.acquire(timeout=10.0)
    assert backends.Gated.entered.acquire(timeout=10.0)  # the third read has begun
    world.cache.poll()
    assert world.cache.match_prefix(ids(33), touch=False).n_tokens == 0
    assert world.cache.prefetch_ready("r1")
    assert world.cache.match_prefix(ids(33), touch=False).n_tokens == 16
    assert world.cache.finish_prefetch("r1") == 16
    world.check()
    backends.Gated.gate.release(8)
    _until(world, lambda: world.cache.snapshot().host.in_flight_pages == 0)
    assert world.cache.match_prefix(ids(33), touch=False).n_tokens == 24  # the fourth never began


def test_two_requests_for_the_same_pages_read_them_once(worlds: list[World]) -> None:
    stored(worlds)
    world = on(worlds, backends.Gated)
    assert world.cache.prefetch("r1", ids(33))
    _until_reading(world)
    assert world.cache.prefetch("r2", ids(33))
    backends.Gated.gate.release(1)  # one read for eight pages: both get them
    world.wait_for_prefetch("r1")
    world.wait_for_prefetch("r2")
    assert world.cache.finish_prefetch("r1") == 32
    assert world.cache.finish_prefetch("r2") == 0
    assert world.cache.snapshot().host.cached_pages == 8


def test_a_request_that_computes_what_is_still_being_read_keeps_both_right(
    worlds: list[World],
) -> None:
    stored(worlds)
    world = on(worlds, backends.Gated, hicache_storage_prefetch_policy="best_effort")
    assert world.cache.prefetch("r1", ids(33))
    _until_reading(world)
    world.request(ids(33), prefetch=False)
    backends.Gated.gate.release(8)
    _until(world, lambda: world.cache.snapshot().host.in_flight_pages == 0)
    world.flush_device()
    assert world.request(ids(33), prefetch=False).host == 32


def test_close_with_a_stuck_read_ends_in_bounded_time(worlds: list[World]) -> None:
    stored(worlds)
    world = on(worlds, backends.Gated)
    worlds.remove(world)
    assert world.cache.prefetch("r1", ids(33))
    _until_reading(world)
    world.cache.close(timeout_s=0.2)
    backends.Gated.gate.release(8)


def _until_reading(world: World) -> None:
    """Polls until a read has reached the backend."""
    _until(world, lambda: world.cache.snapshot().bytes_in_flight["read"] > 0)
    assert backends.Gated.entered.acquire(timeout=10.0)


def _until(world: World, condition: Any, polls: int = 2000) -> None:
    for _ in range(polls):
        if condition():
            return
        world.cache.wait(0.01)
        world.cache.poll()
        world.check()
    raise AssertionError("it never came to that")


def test_write_back_evicts_a_prefix_while_what_follows_it_is_still_being_stored(
    worlds: list[World],
) -> None:
    """A slow store must not keep the pages above its write on the device."""
    world = on(worlds, backends.GatedWrites, hicache_write_policy="write_back")
    world.request(ids(17))
    world.request(ids(33))  # a second node, below the first
    assert world.cache.evict(4) == 4  # its store waits at the gate
    assert world.cache.evict(4) == 4
    world.check()
    backends.GatedWrites.gate.release(8)
    assert world.request(ids(33)).host == 32


HASTY = {"guard": {"deadline_base_s": 0.2, "deadline_per_gib_s": 0.0}}


def test_a_read_that_hangs_costs_its_deadline_and_keeps_only_its_own_pages(
    worlds: list[World],
) -> None:
    """The request goes on; the pages come back when the call does, and nobody had them before."""
    stored(worlds)
    world = on(worlds, backends.Gated, keys=HASTY)
    outcome = world.request(ids(33))  # waits for its deadline, and computes
    assert outcome == Outcome(0, 0, 0, computed_pages=8)
    assert world.cache.snapshot().quarantined_pages == 8
    assert world.request(ids(33)).device == 32
    backends.Gated.gate.release(8)
    _until(world, lambda: world.cache.snapshot().quarantined_pages == 0)
    assert world.cache.snapshot().overdue_jobs == 0


def test_a_store_that_hangs_is_asked_once_and_then_left_alone(worlds: list[World]) -> None:
    """A dead store costs its deadline once a breaker window."""
    stored(worlds)
    world = on(worlds, backends.Gated, keys=HASTY)
    world.request(ids(33))
    n_asked = backends.Gated.entered._value
    for _ in range(5):
        assert world.cache.flush(10.0)
        while not world.cache.reset():
            world.cache.poll()
        assert world.request(ids(33)).computed_pages == 8
    assert backends.Gated.entered._value <= n_asked + 1
    backends.Gated.gate.release(8)


def test_closing_with_a_call_that_hangs_for_ever_leaves_its_memory_alone(
    worlds: list[World], caplog: pytest.LogCaptureFixture
) -> None:
    stored(worlds)
    world = on(worlds, backends.Gated, keys=HASTY)
    worlds.remove(world)
    world.request(ids(33))
    world.cache.close(timeout_s=0.2)
    assert "may still touch it" in caplog.text
    backends.Gated.gate.release(8)
