"""A trial: a tiny model with a cache, step by step, beside the same model without one."""

from __future__ import annotations

import ast
import re
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import DynamicCache

from hicache_core.errors import HiCacheError
from hicache_core.kv.spec import KVSpec
from hicache_core.types import CachedTokens
from tests.models.architectures import Case
from tests.models.findings import Finding, Outcome, Step, Verdict
from tests.models.tiny import tiny_model
from tests.models.truth import Truth, apart, prompt_of
from tests.models.ways import Asked, Way, in_cached_model, in_engine

PROMPT = prompt_of(200)
HALF = PROMPT[:100]

_TIERS = ("device", "host", "storage")

_WAYS = (in_cached_model, in_engine)

_KINDS = {
    "DummyLayer": "shared or none",
    "DynamicIndexedLayer": "full with indexer",
    "DynamicLayer": "full",
    "DynamicSlidingWindowLayer": "window",
    "LinearAttentionAndFullAttentionLayer": "state and full",
    "LinearAttentionAndSlidingWindowAttentionLayer": "state and window",
    "LinearAttentionLayer": "state",
}
"""The layers of transformers' own cache, in words."""


def try_case(case: Case) -> Finding:
    """Tries a model in ``CachedModel`` and in the engine, and follows the advice of a refusal."""
    try:
        model = tiny_model(case)
    except Exception as error:  # whatever transformers raises
        outcome = Outcome(Verdict.NOT_TRIED, f"no tiny one can be built: {_line(error)}")
        return Finding(case, outcome, outcome)
    layers = _layers_of(model)
    truth = Truth(model)
    try:
        moved = truth.moved_by(PROMPT, 3), truth.moved_by(PROMPT, 190)
        truth.of(PROMPT)
    except Exception as error:
        reason = f"model.generate itself fails: {_line(error)}"
        outcomes = [_refusal(way, model) or Outcome(Verdict.NOT_TRIED, reason) for way in _WAYS]
        return Finding(case, *outcomes, layers)
    adapter = _outcome(in_cached_model, model, truth)
    engine = _outcome(in_engine, model, truth, at_once=True)
    return Finding(case, adapter, engine, layers, moved, _follow(case, adapter))


def _refusal(way: Way, model: Any) -> Outcome | None:
    """What a model is refused with, if it is."""
    try:
        with way(model, uuid.uuid4().hex):
            return None
    except HiCacheError as error:
        return Outcome(Verdict.REFUSED, _line(error, with_class=False))


def _outcome(way: Way, model: Any, truth: Truth, *, at_once: bool = False) -> Outcome:
    store = uuid.uuid4().hex
    try:
        with way(model, store) as asked:
            kept = _kept(asked.spec)
            steps = _steps(asked, truth)
            if at_once:
                prompts = [HALF + prompt_of(100, seed=5), prompt_of(120, seed=6)]
                steps.append(_step("together", asked, truth, prompts))
            asked.empty_device()
            with way(model, store) as another:
                steps.append(_step("storage", another, truth, [PROMPT]))
    except HiCacheError as error:
        return Outcome(Verdict.REFUSED, _line(error, with_class=False))
    except Exception as error:
        return Outcome(Verdict.CRASHED, f"at open or close: {_line(error)}")
    return Outcome.of(tuple(steps), kept)


def _steps(asked: Asked, truth: Truth) -> list[Step]:
    steps = [_step(name, asked, truth, [PROMPT]) for name in ("cold", "device")]
    asked.empty_device()
    steps.append(_step("host", asked, truth, [PROMPT]))
    next_turn = PROMPT + truth.of(PROMPT).tokens + prompt_of(20, seed=3)
    others = {
        "half": HALF + prompt_of(100, seed=1),
        "branch": HALF + prompt_of(100, seed=2),
        "shorter": PROMPT[:150],
        "next turn": next_turn,
    }
    return steps + [_step(name, asked, truth, [prompt]) for name, prompt in others.items()]


def _step(name: str, asked: Asked, truth: Truth, prompts: Sequence[list[int]]) -> Step:
    try:
        answers = asked.ask(prompts)
    except Exception as error:
        return Step(name, error=_line(error))
    found = [each for _, each in answers]
    cached = CachedTokens(*(sum(getattr(each, tier) for each in found) for tier in _TIERS))
    worst = max(
        apart(answer, truth.of(prompt))
        for (answer, _), prompt in zip(answers, prompts, strict=True)
    )
    return Step(name, cached, worst)


def _follow(case: Case, refused: Outcome) -> Finding | None:
    """What comes of an advice ``config.NAME = VALUE``."""
    advice = re.search(r"config\.(\w+) = (\w+|'[^']*')", refused.reason)
    if refused.verdict is not Verdict.REFUSED or advice is None:
        return None
    name, value = advice[1], ast.literal_eval(advice[2])
    if name in case.own:
        return None
    variant = ", ".join(part for part in (case.variant, f"{name} = {value!r}") if part)
    return try_case(replace(case, variant=variant, own={**case.own, name: value}))


def _layers_of(model: Any) -> tuple[str, ...]:
    """The kinds of a model's layers, each once."""
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # the refusal will say what it is
        return ("unknown",)
    names = dict.fromkeys(type(layer).__name__ for layer in layers)
    return tuple(_KINDS.get(name, name) for name in names)


def _kept(spec: KVSpec) -> str:
    """The components of each group: ``full: k v; mamba: conv_0``."""
    groups = [("full", spec), *((group.name, group.spec) for group in getattr(spec, "groups", ()))]
    return "; ".join(
        f"{name}: {' '.join(component.name for component in each.components)}"
        for name, each in groups
        if each.components
    )


def _line(error: Exception, *, with_class: bool = True) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if with_class else text
