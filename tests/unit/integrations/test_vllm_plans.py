"""What vLLM's scheduler is promised, and what the workers are told, without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from hicache_core.integrations.vllm.plans import MAX_FETCH_S, Fetch, Load, Plans, Save, Step
from hicache_core.integrations.vllm.verdicts import MAX_AGE_S

BLOCK = 4


class Clock:
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Prompt:
    """A request; the hash of block n is the byte n."""

    n_prompt: int
    request_id: str = "a"
    n_output: int = 0
    skip_reading_prefix_cache: bool = False
    blocks: list[int] = field(default_factory=lambda: list(range(100, 132)))

    @property
    def num_tokens(self) -> int:
        return self.n_prompt + self.n_output

    @property
    def block_hashes(self) -> Sequence[bytes]:
        return [bytes([n]) for n in range(self.num_tokens // BLOCK)]

    def blocks_of(self, request_id: str) -> Sequence[Sequence[int]]:
        return [self.blocks]


def hashes(first: int, behind: int) -> list[bytes]:
    return [bytes([n]) for n in range(first, behind)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plans(clock: Clock) -> Plans:
    return Plans(BLOCK, 1, clock)


def begun(plans: Plans, n_prompt: int, n_computed: int = 0) -> tuple[Prompt, int]:
    """A request that was asked about, and the id of its fetch."""
    request = Prompt(n_prompt)
    plans.begin(request)
    assert plans.matched_tokens(request, n_computed) is None
    (fetch,) = plans.take_step().fetches
    return request, fetch.fetch_id


def test_a_request_waits_until_its_pages_are_held_and_is_promised_no_more(plans: Plans) -> None:
    request, fetch_id = begun(plans, 17)
    assert plans.matched_tokens(request, 0) is None
    assert plans.take_step() == Step()  # asked once
    plans.fetched({fetch_id: [3]})
    assert plans.matched_tokens(request, 0) == 3 * BLOCK
    plans.allocated(request, request.blocks, 3 * BLOCK)
    assert plans.take_step() == Step(loads=[Load(fetch_id, 0, [100, 101, 102])])
    assert plans.n_fetches == 0


def test_the_block_with_the_last_token_is_always_computed(plans: Plans) -> None:
    request = Prompt(16)
    plans.begin(request)
    plans.matched_tokens(request, 0)
    assert plans.take_step().fetches == [Fetch(0, hashes(0, 3))]


def test_blocks_that_vllm_has_itself_are_not_fetched(plans: Plans) -> None:
    request = Prompt(17)
    plans.begin(request)
    assert plans.matched_tokens(request, 16) == 0
    assert plans.take_step() == Step()
    assert plans.matched_tokens(request, 8) is None
    assert plans.take_step().fetches == [Fetch(0, hashes(2, 4))]


def test_a_request_that_must_see_its_whole_prompt_fetches_nothing(plans: Plans) -> None:
    request = Prompt(17, skip_reading_prefix_cache=True)
    plans.begin(request)
    assert plans.matched_tokens(request, 0) == 0
    assert plans.take_step() == Step()


def test_pages_that_vllm_got_meanwhile_are_skipped(plans: Plans) -> None:
    request, fetch_id = begun(plans, 17)
    plans.fetched({fetch_id: [4]})
    assert plans.matched_tokens(request, 2 * BLOCK) == 2 * BLOCK
    plans.allocated(request, request.blocks, 2 * BLOCK)
    assert plans.take_step().loads == [Load(fetch_id, 2, [102, 103])]


def test_blocks_that_vllm_lost_meanwhile_are_asked_for_again(plans: Plans) -> None:
    request, fetch_id = begun(plans, 17, n_computed=2 * BLOCK)
    plans.fetched({fetch_id: [2]})
    assert plans.matched_tokens(request, 0) is None
    step = plans.take_step()
    assert (step.drops, step.fetches) == ([fetch_id], [Fetch(fetch_id + 1, hashes(0, 4))])
    plans.fetched({fetch_id: [2]})  # of the one that was dropped
    assert plans.matched_tokens(request, 0) is None


def test_pages_that_are_not_used_are_dropped(plans: Plans) -> None:
    request, fetch_id = begun(plans, 17)
    plans.fetched({fetch_id: [0]})
    assert plans.matched_tokens(request, 0) == 0
    plans.allocated(request, request.blocks, 0)
    assert plans.take_step() == Step(drops=[fetch_id])


@pytest.mark.parametrize("is_answered", [False, True])
def test_a_request_that_ends_drops_its_fetch(plans: Plans, is_answered: bool) -> None:
    request, fetch_id = begun(plans, 17)
    if is_answered:
        plans.fetched({fetch_id: [2]})
    plans.finish(request.request_id)
    assert plans.take_step() == Step(drops=[fetch_id])
    assert (len(plans), plans.n_fetches) == (0, 0)
    plans.fetched({fetch_id: [2]})


def test_every_worker_must_hold_a_page(clock: Clock) -> None:
    plans = Plans(BLOCK, 2, clock)
    request, fetch_id = begun(plans, 17)
    plans.fetched({fetch_id: [3]})
    assert plans.matched_tokens(request, 0) is None
    plans.fetched({fetch_id: [1]})
    assert plans.matched_tokens(request, 0) == BLOCK


def test_no_request_waits_for_ever(plans: Plans, clock: Clock) -> None:
    request, fetch_id = begun(plans, 17)
    clock.now = MAX_FETCH_S
    assert plans.matched_tokens(request, 0) == 0
    plans.allocated(request, request.blocks, 0)
    assert plans.take_step().drops == [fetch_id]


def test_an_old_miss_is_asked_for_again(plans: Plans, clock: Clock) -> None:
    request, fetch_id = begun(plans, 17)
    plans.fetched({fetch_id: [0]})
    clock.now = MAX_AGE_S
    assert plans.matched_tokens(request, 0) == 0
    clock.now += 0.1
    assert plans.matched_tokens(request, 0) is None
    assert len(plans.take_step().fetches) == 1


def test_a_block_is_saved_once_in_the_step_that_fills_it(plans: Plans) -> None:
    """A prompt in chunks of 6 tokens, then output, then a preemption and the same again."""
    request = Prompt(14)
    plans.begin(request)
    steps = [(0, 6), (6, 6), (12, 2), (14, 1), (15, 1), (0, 16), (16, 1)]
    saved = []
    for n_computed, n_new in steps:
        request.n_output = max(0, n_computed + n_new - request.n_prompt)
        plans.scheduled(request.request_id, n_computed, n_new, request.blocks_of)
        saved.append(plans.take_step().saves)
    assert saved == [
        [Save(hashes(0, 1), [100])],
        [Save(hashes(1, 3), [101, 102])],
        [],
        [],
        [Save(hashes(3, 4), [103])],
        [],
        [],
    ]


def test_what_was_loaded_or_in_vllms_own_cache_is_not_saved(plans: Plans) -> None:
    request, fetch_id = begun(plans, 17, n_computed=BLOCK)
    plans.fetched({fetch_id: [2]})
    plans.matched_tokens(request, BLOCK)
    plans.allocated(request, request.blocks, 2 * BLOCK)
    plans.scheduled(request.request_id, 3 * BLOCK, 5, request.blocks_of)
    assert plans.take_step().saves == [Save(hashes(3, 4), [103])]


def test_a_block_whose_tokens_are_known_late_is_saved_later(plans: Plans) -> None:
    """With asynchronous scheduling the last token of a block is known a step after its KV."""
    request = Prompt(3)
    plans.begin(request)
    plans.scheduled(request.request_id, 0, 3, request.blocks_of)
    plans.scheduled(request.request_id, 3, 1, request.blocks_of)
    assert plans.take_step().saves == []
    request.n_output = 1
    plans.scheduled(request.request_id, 4, 1, request.blocks_of)
    assert plans.take_step().saves == [Save(hashes(0, 1), [100])]


def test_a_request_need_not_be_announced(plans: Plans) -> None:
    """A connector of several may not pass that on."""
    request = Prompt(17)
    assert plans.matched_tokens(request, 0) is None
    plans.allocated(Prompt(17, "b"), [], 0)
    assert len(plans) == 2


def test_requests_that_are_not_known_are_let_pass(plans: Plans) -> None:
    plans.scheduled("nobody", 0, 8, Prompt(8).blocks_of)
    plans.finish("nobody")
    assert plans.take_step() == Step()


def test_a_reset_drops_all_fetches_and_requests_ask_again(plans: Plans) -> None:
    request, fetch_id = begun(plans, 17)
    plans.fetched({fetch_id: [2]})
    plans.forget_fetches()
    assert plans.take_step().drops == [fetch_id]
    assert plans.matched_tokens(request, 0) is None
