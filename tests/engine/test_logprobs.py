"""Log probabilities of prompts and answers, and prompts without an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hicache_core.engine import orders
from hicache_core.engine.logprobs import LogprobRecord
from hicache_core.engine.request import Request, TokenLogprobs, WantedLogprobs
from hicache_core.errors import ConfigError
from tests.engine.test_pressure import FailingLoads
from tests.engine.windowed_models import loaded_model
from tests.engine.world import (
    PAGE_SIZE,
    SteppedEngine,
    cache_config,
    greedy,
    model_of,
    plain,
    prompt_of,
    stepped_engine,
)

WHOLE = WantedLogprobs(top_n=3, prompt_start=0)
PROMPT = prompt_of(21)
MODELS = {"full": model_of, "window": lambda: loaded_model("gemma3")}


def of_model(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """What a forward without any cache says of each next token, (n_tokens - 1, vocabulary)."""
    with torch.inference_mode():
        logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)[:-1]


def check(found: Sequence[TokenLogprobs], tokens: Sequence[int], expected: torch.Tensor) -> None:
    """``found`` is about ``tokens``, whose log probabilities are in the rows of ``expected``."""
    assert [one.token for one in found] == list(tokens)
    for one, row in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
        top = row.topk(len(one.top))
        assert [token for token, _ in one.top] == top.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def check_whole(it: SteppedEngine, asked: str, prompt: Sequence[int], start: int = 0) -> None:
    """A request of ``top_n`` 3 knows of its prompt from ``start`` on, and of its answer."""
    outputs, answer = it.outputs[asked], it.tokens(asked)
    expected = of_model(it.loaded.model, [*prompt, *answer])
    first, *of_prompt = [one for output in outputs for one in output.prompt_logprobs]
    assert first == TokenLogprobs(prompt[start], None, ())
    check(of_prompt, prompt[start + 1 :], expected[start : len(prompt) - 1])
    assert all(len(one.top) == 3 for one in of_prompt)
    of_answer = [one for output in outputs for one in output.logprobs]
    check(of_answer, answer, expected[len(prompt) - 1 :])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 512])
def test_they_are_those_of_a_forward_without_a_cache(name: str, chunk_tokens: int) -> None:
    with stepped_engine(MODELS[name](), chunk_tokens=chunk_tokens) as it:
        for _ in range(2):  # the second time the cache has the prompt
            asked = it.ask(PROMPT, greedy(6), logprobs=WHOLE)
            it.run()
            check_whole(it, asked, PROMPT)
            assert it.last(asked).cached.total == 0


@pytest.mark.parametrize("start", [0, 7, 8, 20])
def test_the_prompt_is_computed_from_its_start_on_and_stored(start: int) -> None:
    with stepped_engine() as it:
        it.ask(PROMPT, greedy(1))
        it.run()
        asked = it.ask(PROMPT, greedy(3), logprobs=WantedLogprobs(3, start))
        it.run()
        check_whole(it, asked, PROMPT, start)
        assert it.last(asked).cached.device == start // PAGE_SIZE * PAGE_SIZE
        others = it.ask(PROMPT, greedy(3))
        it.run()
        assert it.last(others).cached.device == 20


def test_of_the_answer_alone_they_take_nothing_from_the_hits() -> None:
    with stepped_engine() as it:
        for cached in (0, 20):
            asked = it.ask(PROMPT, greedy(4), logprobs=WantedLogprobs(top_n=1))
            it.run()
            assert it.last(asked).cached.device == cached
            assert not any(output.prompt_logprobs for output in it.outputs[asked])
            assert [len(output.logprobs) for output in it.outputs[asked]] == [1] * 4


def test_storage_is_not_asked_for_what_must_be_computed() -> None:
    config = cache_config(hicache_storage_backend="memory")
    with stepped_engine(cache=config) as it:
        it.ask(PROMPT, greedy(1))
        it.run()
        assert it.cache.flush(20.0)
        assert it.cache.reset()
        for start, cached in ((0, 0), (9, 8)):
            asked = it.ask(PROMPT, greedy(1), logprobs=WantedLogprobs(3, start))
            it.run()
            check_whole(it, asked, PROMPT, start)
            assert it.last(asked).cached.storage == cached
            assert it.cache.flush(20.0)
            assert it.cache.reset()


def test_who_asks_for_none_gets_none_and_the_same_tokens() -> None:
    prompts = [prompt_of(9 + n, seed=n) for n in range(3)]
    with stepped_engine(chunk_tokens=6) as it:
        asked = [it.ask(prompts[0], greedy(8)), it.ask(prompts[1], greedy(8), logprobs=WHOLE)]
        asked.append(it.ask(prompts[2], greedy(8)))
        it.run()
        for request_id, prompt in zip(asked, prompts, strict=True):
            assert it.tokens(request_id) == plain(it.loaded, prompt, 8)
        check_whole(it, asked[1], prompts[1])
        for request_id in (asked[0], asked[2]):
            assert not any(o.logprobs or o.prompt_logprobs for o in it.outputs[request_id])


def test_a_request_that_was_preempted_tells_of_each_token_once() -> None:
    prompts = [prompt_of(6, seed=n) for n in range(4)]
    with stepped_engine(n_pages=12, max_running=4) as it:
        asked = [it.ask(prompt, greedy(26), logprobs=WHOLE) for prompt in prompts]
        it.run()
        assert it.scheduler.tally.preempted > 0
        for request_id, prompt in zip(asked, prompts, strict=True):
            check_whole(it, request_id, prompt)


def test_a_request_whose_prefix_does_not_arrive_tells_of_each_token_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stepped_engine() as it:
        it.ask(PROMPT, greedy(1))
        it.run()
        it.cache.flush()
        it.cache.evict(it.pool.n_pages)
        FailingLoads(it, monkeypatch, 1)
        asked = it.ask(PROMPT, greedy(4), logprobs=WantedLogprobs(3, 13))
        it.run()
        assert it.scheduler.tally.restarted == 1
        check_whole(it, asked, PROMPT, 13)


@pytest.mark.parametrize("logprobs", [None, WHOLE])
def test_a_prompt_without_an_answer_is_computed_and_stored(logprobs: WantedLogprobs | None) -> None:
    with stepped_engine(chunk_tokens=8) as it:
        asked = it.ask(PROMPT, greedy(0), logprobs=logprobs)
        it.run()
        (output,) = it.outputs[asked]
        assert (output.finish_reason, output.new_tokens, output.text) == ("length", (), "")
        assert output.completion_tokens == 0
        assert output.times.first_token == 0.0
        if logprobs is not None:
            check_whole(it, asked, PROMPT)
        after = it.ask(PROMPT, greedy(3))
        it.run()
        assert it.last(after).cached.device == 20
        assert it.tokens(after) == plain(it.loaded, PROMPT, 3)


def test_rows_that_come_again_are_taken_once_and_few_at_a_time() -> None:
    prompt = prompt_of(200)
    logits = torch.randn(200, 512, generator=torch.Generator().manual_seed(1))
    record = LogprobRecord(WantedLogprobs(2, 10), prompt)
    for start, stop in ((0, 50), (0, 120), (100, 200)):
        n_rows = record.n_rows(start, stop)
        record.take_rows(stop, logits[stop - n_rows : stop])
    assert record.n_rows(0, 200) == 1
    assert record.n_reusable(230) == 230
    (first, *found), of_answer = record.taken()
    assert (first.token, first.logprob, of_answer) == (prompt[10], None, ())
    check(found, prompt[11:], torch.log_softmax(logits, -1)[10:199])
    assert record.taken() == ((), ())


@pytest.mark.parametrize(
    ("wanted", "said"),
    [(WantedLogprobs(0, 5), "prompt_start is 5"), (WantedLogprobs(-1), "top_n is -1")],
)
def test_what_is_no_position_of_the_prompt_is_refused(wanted: WantedLogprobs, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LogprobRecord(wanted, prompt_of(5))


@pytest.mark.parametrize("logprobs", [None, WHOLE])
def test_other_ranks_hear_what_is_wanted(logprobs: WantedLogprobs | None) -> None:
    request = Request("r", (1, 2, 3), greedy(2), logprobs=logprobs)
    given = orders.StepOrders((orders.Add(request, 1, 7, 2),))
    assert orders.decode(orders.encode(given)) == given
