"""Little room, lost loads, clients that leave: never a deadlock, never a wrong token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hicache_core.copies.base import Direction
from hicache_core.errors import LoadFailed
from hicache_core.types import CachedTokens
from tests.engine.world import (
    PAGE_SIZE,
    SteppedEngine,
    cache_config,
    greedy,
    plain,
    prompt_of,
    stepped_engine,
)

POLICIES = ["write_through", "write_through_selective", "write_back"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pool_too_small_for_all_makes_the_last_wait_again(policy: str) -> None:
    prompts = [prompt_of(6, seed=n) for n in range(4)]
    config = cache_config(hicache_write_policy=policy)
    # Each needs 8 pages in the end.
    with stepped_engine(n_pages=12, cache=config, max_running=4) as it:
        asked = [it.ask(prompt, greedy(26)) for prompt in prompts]
        it.run()
        for request_id, prompt in zip(asked, prompts, strict=True):
            assert it.tokens(request_id) == plain(it.loaded, prompt, 26)
        assert it.scheduler.tally.preempted > 0


def test_the_first_in_order_is_never_made_to_wait_again() -> None:
    with stepped_engine(n_pages=12, max_running=4) as it:
        asked = [it.ask(prompt_of(6, seed=n), greedy(26)) for n in range(4)]
        ended: list[str] = []
        while it.is_busy:
            it.step()
            ended += [
                request_id
                for request_id in asked
                if request_id not in ended
                and it.outputs[request_id]
                and it.last(request_id).finish_reason
            ]
        assert ended == asked


def test_a_request_that_fills_the_pool_alone_is_answered() -> None:
    prompt = prompt_of(6)
    with stepped_engine(n_pages=8) as it:
        asked = it.ask(prompt, greedy(26))
        other = it.ask(prompt_of(30, seed=1), greedy(2))
        it.run()
        assert it.tokens(asked) == plain(it.loaded, prompt, 26)
        assert it.tokens(other) == plain(it.loaded, prompt_of(30, seed=1), 2)


def test_what_a_preempted_request_had_is_cache_when_it_comes_back() -> None:
    """Its ``cached`` stays what it was when it was admitted first."""
    with stepped_engine(n_pages=12, max_running=2) as it:
        first = it.ask(prompt_of(6, seed=0), greedy(26))
        second = it.ask(prompt_of(6, seed=1), greedy(26))
        it.run_until(lambda: it.scheduler.tally.preempted > 0)
        computed = prompt_of(6, seed=1) + list(it.tokens(second))
        assert it.cache.match_prefix(computed, touch=False).n_tokens > 0
        it.run()
        assert it.last(second).cached == CachedTokens()
        assert it.last(first).finish_reason == "length"


@pytest.mark.parametrize(
    ("policy", "leaves"),
    [("wait_complete", False), ("best_effort", False), ("wait_complete", True)],
)
def test_what_a_preempted_request_has_lost_is_loaded_from_storage(
    policy: str, leaves: bool
) -> None:
    """As for a request that arrives. Here storage is all that has its pages when it comes back."""
    config = cache_config(
        hicache_storage_backend="memory",
        hicache_storage_prefetch_policy=policy,
        hicache_host_retention="free_once_stored",
    )
    with stepped_engine(n_pages=12, cache=config, max_running=2) as it:
        first = it.ask(prompt_of(6, seed=0), greedy(26))
        second = it.ask(prompt_of(6, seed=1), greedy(26))
        it.run_until(lambda: it.scheduler.tally.preempted > 0)
        n_pages = (6 + len(it.tokens(second)) - 1) // PAGE_SIZE
        assert n_pages > 1
        assert it.cache.flush(20.0)
        it.cache.evict(12)
        lost = prompt_of(6, seed=1) + list(it.tokens(second))
        assert it.cache.match_prefix(lost, touch=False).n_tokens == 0
        assert it.cache.counters.storage_hit_tokens == 0
        if leaves:
            it.run_until(lambda: it.last(first).finish_reason is not None)
            it.step()
            it.scheduler.abort(second)
            assert it.last(second).finish_reason == "abort"
        it.run()
        if not leaves:
            assert it.tokens(second) == plain(it.loaded, prompt_of(6, seed=1), 26)
        if policy == "wait_complete" and not leaves:
            assert it.cache.counters.storage_hit_tokens == n_pages * PAGE_SIZE


def test_a_preempted_request_whose_pages_are_still_there_asks_nobody() -> None:
    config = cache_config(hicache_storage_backend="memory")
    with stepped_engine(n_pages=12, cache=config, max_running=2) as it:
        it.ask(prompt_of(6, seed=0), greedy(26))
        second = it.ask(prompt_of(6, seed=1), greedy(26))
        it.run()
        assert it.scheduler.tally.preempted > 0
        assert it.cache.counters.storage_hit_tokens == 0, "the host had them"
        assert it.tokens(second) == plain(it.loaded, prompt_of(6, seed=1), 26)


@pytest.mark.parametrize("n_steps", range(9))
def test_a_client_may_leave_in_every_state(n_steps: int) -> None:
    """Waiting, inside its prompt, at the first token, while decoding, when it has ended."""
    prompt, other = prompt_of(17), prompt_of(9, seed=1)
    with stepped_engine(chunk_tokens=5, max_running=2) as it:
        stays = it.ask(other, greedy(12))
        leaves = it.ask(prompt, greedy(3))
        for _ in range(n_steps):
            it.step()
        had_ended = bool(it.outputs[leaves]) and it.last(leaves).finish_reason is not None
        it.scheduler.abort(leaves)
        it.cache.check_integrity()
        assert it.last(leaves).finish_reason == ("length" if had_ended else "abort")
        it.run()
        assert it.tokens(stays) == plain(it.loaded, other, 12)
        assert it.tokens(leaves) == plain(it.loaded, prompt, 3)[: len(it.tokens(leaves))]


def test_a_client_may_leave_while_storage_is_asked() -> None:
    config = cache_config(hicache_storage_backend="memory")
    with stepped_engine(cache=config) as it:
        asked = it.ask(prompt_of(21))
        it.scheduler.abort(asked)
        assert it.last(asked).finish_reason == "abort"
        it.run()


class FailingLoads:
    """Lets the next ``n`` waits for a layer of a cache fail, as a copy that failed does."""

    def __init__(self, it: SteppedEngine, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self._left = n
        self._wait: Callable[[int], None] = it.cache.wait_layer
        monkeypatch.setattr(it.cache, "wait_layer", self)

    def __call__(self, layer: int) -> None:
        """Waits, or fails behind layer 0, which has been computed then; one may keep nothing."""
        self._wait(layer)
        if layer >= 1 and self._left:
            self._left -= 1
            raise LoadFailed("a copy failed, in a test")


@pytest.mark.parametrize("n_failures", [1, 2, 3])
def test_a_request_whose_prefix_does_not_arrive_starts_over(
    n_failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(21)
    with stepped_engine() as it:
        it.ask(prompt, greedy(1))
        it.run()
        it.cache.flush()
        it.cache.evict(it.pool.n_pages)
        FailingLoads(it, monkeypatch, n_failures)
        again = it.ask(prompt)
        beside = it.ask(prompt_of(9, seed=1))
        it.run()
        assert it.scheduler.tally.restarted > 0
        assert it.last(again).cached == CachedTokens()
        assert it.tokens(again) == plain(it.loaded, prompt, 8)
        assert it.tokens(beside) == plain(it.loaded, prompt_of(9, seed=1), 8)


@pytest.mark.parametrize("n_beside", [0, 2])
def test_a_copy_that_fails_costs_a_computation_and_nothing_else(
    n_beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy itself raises, on the copy thread; requests with the same prefix are beside it."""
    prompt = prompt_of(21)
    with stepped_engine(max_running=4) as it:
        it.ask(prompt, greedy(1))
        it.run()
        it.cache.flush()
        it.cache.evict(it.pool.n_pages)
        transfer: Any = it.cache.parts.transfer
        prepare = transfer._prepare

        def failing(direction: Direction, *pages: Any) -> Any:
            if direction is Direction.TO_HOST:
                return prepare(direction, *pages)

            def copy(layers: range) -> None:
                raise RuntimeError("no such luck")

            return copy

        monkeypatch.setattr(transfer, "_prepare", failing)
        asked = [it.ask(prompt + prompt_of(n, seed=n)) for n in range(1 + n_beside)]
        it.run()
        assert it.scheduler.tally.restarted > 0
        for n, request_id in enumerate(asked):
            assert it.tokens(request_id) == plain(it.loaded, prompt + prompt_of(n, seed=n), 8)


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Arrivals of prompts with shared beginnings, clients that leave, steps between them."""
    arrive = st.tuples(
        st.just("ask"),
        st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 12), st.integers(0, 1)),
    )
    leave = st.tuples(st.just("leave"), st.integers(0, 10))
    step = st.tuples(st.just("step"), st.integers(1, 6))
    evict = st.tuples(st.just("evict"), st.integers(1, 12))
    return draw(st.lists(st.one_of(arrive, arrive, step, step, leave, evict), max_size=25))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(
    schedule=schedules(),
    n_pages=st.integers(8, 24),
    chunk_tokens=st.integers(1, 24),
    offload_stride=st.integers(0, 2),
    policy=st.sampled_from(POLICIES),
    storage=st.sampled_from([None, "memory"]),
)
def test_any_schedule_ends_with_the_tokens_of_plain_generate(
    schedule: list[tuple[str, Any]],
    n_pages: int,
    chunk_tokens: int,
    offload_stride: int,
    policy: str,
    storage: str | None,
) -> None:
    config = cache_config(hicache_write_policy=policy, hicache_storage_backend=storage)
    with stepped_engine(
        n_pages=n_pages,
        cache=config,
        max_running=3,
        chunk_tokens=chunk_tokens,
        offload_stride=offload_stride,
    ) as it:
        prompts: dict[str, tuple[list[int], int]] = {}
        for kind, detail in schedule:
            if kind == "ask":
                family, n_prompt, n_new, priority = detail
                n_prompt = min(n_prompt, n_pages * PAGE_SIZE - n_new)
                prompt = prompt_of(20, seed=family)[:n_prompt]
                prompts[it.ask(prompt, greedy(n_new), priority=priority)] = (prompt, n_new)
            elif kind == "leave" and detail < len(prompts):
                it.scheduler.abort(list(prompts)[detail])
            elif kind == "evict":
                it.cache.evict(detail)
            else:
                for _ in range(detail):
                    it.step()
        it.run()
        for request_id, (prompt, n_new) in prompts.items():
            expected = plain(it.loaded, prompt, n_new)
            n_got = len(it.tokens(request_id))
            assert it.tokens(request_id) == expected[:n_got]
            assert it.last(request_id).finish_reason == ("length" if n_got == n_new else "abort")
            assert it.last(request_id).cached.total < len(prompt)
        assert it.scheduler.n_used_pages == 0
