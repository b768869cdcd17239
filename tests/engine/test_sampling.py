"""Which token comes next: greedy, by chance with a seed, and what may not come yet."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_core.engine.request import SamplingParams
from hicache_core.engine.sampling import Sampler, check_sampling
from hicache_core.errors import ConfigError
from tests.engine.world import (
    EOS,
    SteppedEngine,
    greedy,
    model_of,
    prompt_of,
    stepped_engine,
    with_text,
)

LOGITS = torch.tensor([0.5, 3.0, 2.0, 1.0, -1.0])


def drawn(params: SamplingParams, n: int = 2000) -> Counter[int]:
    """How often each token comes in ``n`` positions."""
    sampler = Sampler(params, seed=7, eos_token_ids=())
    return Counter(sampler.choose(LOGITS, position) for position in range(n))


def test_temperature_0_takes_the_most_probable() -> None:
    assert set(drawn(SamplingParams(temperature=0), 20)) == {1}


def test_top_k_1_takes_the_most_probable() -> None:
    assert set(drawn(SamplingParams(top_k=1), 20)) == {1}


def test_top_k_leaves_the_k_most_probable() -> None:
    assert set(drawn(SamplingParams(top_k=3))) == {1, 2, 3}


def test_top_p_leaves_the_fewest_that_reach_it() -> None:
    probabilities = torch.softmax(LOGITS, 0)
    two = float(probabilities[1] + probabilities[2])
    assert set(drawn(SamplingParams(top_p=two - 0.01))) == {1, 2}
    assert set(drawn(SamplingParams(top_p=two + 0.01))) == {1, 2, 3}
    assert set(drawn(SamplingParams(top_p=0.01), 50)) == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    n = 4000
    found = drawn(SamplingParams(temperature=temperature), n)
    for token, probability in enumerate(torch.softmax(LOGITS / temperature, 0).tolist()):
        assert abs(found[token] / n - probability) < 0.03


@given(
    logits=st.lists(st.floats(-30, 30), min_size=2, max_size=40),
    top_k=st.integers(-1, 40).filter(bool),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.01, 10),
    seed=st.integers(),
)
@settings(max_examples=200, deadline=None)
def test_what_is_drawn_is_never_outside_top_k_and_top_p(
    logits: list[float], top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    token = Sampler(params, seed, ()).choose(torch.tensor(logits), 0)
    probabilities = torch.softmax(torch.tensor(logits).double() / temperature, 0)
    better = probabilities > probabilities[token]
    assert top_k < 0 or int(better.sum()) < top_k
    kept = float(torch.softmax(torch.tensor(logits).double() / temperature, 0)[better].sum())
    share = float(probabilities.topk(top_k).values.sum()) if 0 < top_k < len(logits) else 1.0
    assert kept <= top_p + 1e-9 or kept / share <= top_p + 1e-9


def test_ends_do_not_come_before_min_new_tokens() -> None:
    logits = torch.tensor([0.0, 9.0, 8.0, 7.0])
    params = SamplingParams(temperature=0, min_new_tokens=2, stop_token_ids=(2, 99))
    sampler = Sampler(params, 0, eos_token_ids={1})
    assert [sampler.choose(logits, position) for position in range(4)] == [3, 3, 1, 1]
    assert logits.tolist() == [0.0, 9.0, 8.0, 7.0]


def test_ignore_eos_leaves_the_stop_tokens() -> None:
    sampler = Sampler(SamplingParams(ignore_eos=True, stop_token_ids=(5,)), 0, {1})
    assert (sampler.is_end(1), sampler.is_end(5)) == (False, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 0),
        ("top_k", -2),
        ("min_new_tokens", 129),
        ("stop", ("a", "")),
    ],
)
def test_what_is_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is "):
        check_sampling(SamplingParams(**{name: value}))  # type: ignore[arg-type]


def ask_hot(it: SteppedEngine, seed: int) -> str:
    """A request whose tokens come by chance."""
    return it.ask(prompt_of(9), SamplingParams(max_new_tokens=12, temperature=3.0, seed=seed))


def test_equal_seeds_give_equal_answers_whatever_runs_beside() -> None:
    with stepped_engine(n_pages=200) as it:
        alone = ask_hot(it, 5)
        it.run()
        beside = [it.ask(prompt_of(3 + n, seed=n), greedy(20)) for n in range(4)]
        it.step()
        again = ask_hot(it, 5)
        other = ask_hot(it, 6)
        it.run()
        assert it.tokens(again) == it.tokens(alone)
        assert it.tokens(other) != it.tokens(alone)
        assert all(len(it.tokens(request_id)) == 20 for request_id in beside)


def test_equal_seeds_give_equal_answers_after_preemption() -> None:
    with stepped_engine(n_pages=200) as it:
        calm = [ask_hot(it, seed) for seed in range(4)]
        it.run()
    with stepped_engine(n_pages=9, max_running=4) as tight:
        pressed = [ask_hot(tight, seed) for seed in range(4)]
        tight.run()
        assert tight.scheduler.tally.preempted > 0
        assert [tight.tokens(r) for r in pressed] == [it.tokens(r) for r in calm]


def test_a_stop_token_ends_the_answer_and_is_no_text() -> None:
    loaded = with_text(model_of())
    with stepped_engine(loaded) as it:
        free = it.ask(prompt_of(9), greedy(8, ignore_eos=True))
        it.run()
        tokens = it.tokens(free)
        at = next(n for n in range(2, 8) if tokens[n] not in tokens[:n])
        asked = it.ask(prompt_of(9), greedy(8, stop_token_ids=(tokens[at],)))
        it.run()
        assert it.tokens(asked) == tokens[: at + 1]
        assert it.last(asked).finish_reason == "stop"
        expected = loaded.tokenizer.decode(
            tokens[:at], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert it.text(asked) == expected


def test_end_of_sequence_ends_the_answer_unless_ignored() -> None:
    """The model is made to prefer its end, by a temperature of 0 and a bias on the logits."""
    loaded = with_text(model_of())
    with stepped_engine(loaded) as it:
        decode = it.scheduler._runner.decode

        def biased(batch: object) -> torch.Tensor:
            logits = decode(batch).clone()  # type: ignore[arg-type]
            logits[:, EOS] = 1e9
            return logits

        it.scheduler._runner.decode = biased  # type: ignore[method-assign,assignment]
        ends = it.ask(prompt_of(9), greedy(6))
        late = it.ask(prompt_of(9), greedy(6, min_new_tokens=4))
        ignores = it.ask(prompt_of(9), greedy(6, ignore_eos=True))
        it.run()
        assert it.tokens(ends)[1:] == (EOS,)
        assert it.last(ends).finish_reason == "stop"
        assert (len(it.tokens(late)), it.tokens(late)[-1]) == (5, EOS)
        assert it.tokens(ignores)[1:] == (EOS,) * 5
        assert it.last(ignores).finish_reason == "length"
