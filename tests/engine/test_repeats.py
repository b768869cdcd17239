"""Prompts that repeat, in pools that are just large enough: every request ends."""

from __future__ import annotations

from random import Random

import pytest

from tests.engine.test_kv_feed import listening
from tests.engine.world import (
    PAGE_SIZE,
    SteppedEngine,
    cache_config,
    greedy,
    plain,
    prompt_of,
    stepped_engine,
)

N_WORLDS = 30
POLICIES = ["write_through", "write_through_selective", "write_back"]


@pytest.mark.parametrize("offload_stride", [0, 1, 2])
def test_a_prompt_that_is_asked_again_ends_in_a_pool_that_it_fills_alone(
    offload_stride: int,
) -> None:
    prompt = prompt_of(20)
    with stepped_engine(n_pages=13, offload_stride=offload_stride) as it:
        for _ in range(3):
            asked = it.ask(prompt, greedy(32))
            it.run()
            assert it.tokens(asked) == plain(it.loaded, prompt, 32)


def test_two_equal_requests_share_what_they_generate() -> None:
    prompt = prompt_of(4 * PAGE_SIZE)
    with stepped_engine(n_pages=40, offload_stride=1) as it:
        asked = [it.ask(prompt, greedy(20)) for _ in range(2)]
        it.run_until(lambda: len(it.tokens(asked[1])) == 15)
        n_shared = 4 + 14 // PAGE_SIZE  # whole pages; each has one more that is begun
        assert it.scheduler.n_used_pages == n_shared + 2
        n_taken = it.pool.n_pages - it.pool.allocator.n_free
        assert n_taken == n_shared + 2, "nobody keeps a second copy"
        it.run()
        for request_id in asked:
            assert it.tokens(request_id) == plain(it.loaded, prompt, 20)


def test_a_request_that_is_sent_gives_its_second_copies_up_for_room() -> None:
    """Pages that a listener reads stay as they are, so the tree has others for the same tokens."""
    prompt = prompt_of(20)
    with stepped_engine(n_pages=14, offload_stride=1, max_running=2) as it:
        listening(it)
        for n_new in (12, 32):
            it.ask(prompt, greedy(n_new), request_id=f"w{n_new}")
        it.run()
        assert it.tokens("w32") == plain(it.loaded, prompt, 32)


def _live(it: SteppedEngine, draw: Random, n_pages: int) -> None:
    """Requests for three prompts and what they begin with, at random moments."""
    families = [prompt_of(20, seed=n) for n in range(3)]
    asked: dict[str, tuple[list[int], int]] = {}
    for _ in range(draw.randint(2, 8)):
        n_new = draw.choice((1, 4, 12, 16))
        n_prompt = min(draw.choice((5, 12, 17, 20, 20)), n_pages * PAGE_SIZE - n_new)
        prompt = draw.choice(families)[:n_prompt]
        name = f"{draw.choice('wr')}{len(asked)}"  # those with w are sent, if anybody listens
        it.ask(prompt, greedy(n_new), request_id=name, priority=draw.choice((0, 0, 1)))
        asked[name] = (prompt, n_new)
        for _ in range(draw.choice((0, 0, 1, 5, 30))):
            it.step()
        if draw.random() < 0.1:
            it.scheduler.abort(draw.choice(list(asked)))
        if draw.random() < 0.1:
            it.cache.evict(draw.randint(1, n_pages))
    it.run(3000)
    for name, (prompt, n_new) in asked.items():
        n_got = len(it.tokens(name))
        assert it.tokens(name) == plain(it.loaded, prompt, n_new)[:n_got]
        assert it.last(name).finish_reason == ("length" if n_got == n_new else "abort")
    assert it.scheduler.n_used_pages == 0


@pytest.mark.parametrize("offload_stride", [0, 1, 2])
def test_in_every_random_world_all_requests_end(offload_stride: int) -> None:
    for seed in range(N_WORLDS):
        draw = Random(f"{offload_stride} {seed}")
        n_pages = draw.randint(8, 16)
        config = cache_config(
            hicache_write_policy=draw.choice(POLICIES),
            hicache_storage_backend=draw.choice((None, "memory")),
            hicache_size=0,
            enable_hierarchical_cache=draw.random() < 0.8,
        )
        with stepped_engine(
            n_pages=n_pages,
            cache=config,
            max_running=draw.randint(1, 4),
            chunk_tokens=draw.choice((3, 8, 64)),
            offload_stride=offload_stride,
        ) as it:
            if draw.random() < 0.3:
                listening(it)
            try:
                _live(it, draw, n_pages)
            except AssertionError as error:
                raise AssertionError(f"world {seed} with stride {offload_stride}") from error
