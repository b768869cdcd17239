"""What the demo's processes tell each other, and what the outcome says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hicache_core.demo.plan import N_STEPS, PROCESSES
from hicache_core.demo.records import (
    TIERS,
    DemoSettings,
    Event,
    Facts,
    Failure,
    Note,
    Outcome,
    Step,
    TurnRecord,
    from_line,
    to_line,
)

SETTINGS = DemoSettings("smollm2", 8, 2, {"hicache_storage_backend": "file"}, "salt")


def record(**changes: Any) -> TurnRecord:
    fields: dict[str, Any] = {
        "turn": 2,
        "pid": 41,
        "label": "same conversation",
        "tier": "device",
        "question": "?",
        "answer": "!",
        "prompt_tokens": 100,
        "cached_tokens": {"device": 64, "host": 0, "storage": 0},
        "new_tokens": 8,
        "ttft_s": 0.5,
        "baseline_ttft_s": 4.0,
        "decode_tokens_per_s": 10.0,
        "baseline_decode_tokens_per_s": 11.0,
        "identical": True,
        "logits_difference": 1e-5,
        "logits_margin": 0.5,
    }
    return TurnRecord(**{**fields, **changes})


@pytest.mark.parametrize(
    "event",
    [Step("loading"), Note("a\nb"), Failure("no"), record(), Facts(1, "m", "float32", {"a": 1})],
)
def test_an_event_survives_its_line(event: Event) -> None:
    line = to_line(event)
    assert "\n" not in line
    assert from_line(line) == event


def test_settings_survive_their_text() -> None:
    assert DemoSettings.from_json(SETTINGS.to_json()) == SETTINGS


def test_the_json_has_the_promised_keys() -> None:
    document = json.loads(json.dumps(Outcome(SETTINGS, [record()]).public()))
    assert document["turns"] == [
        {
            "turn": 2,
            "prompt_tokens": 100,
            "cached_tokens": {"device": 64, "host": 0, "storage": 0},
            "ttft_s": 0.5,
            "baseline_ttft_s": 4.0,
            "identical": True,
        }
    ]
    assert document["summary"]["identical"] is True
    assert document["summary"]["problems"] == []


def test_different_tokens_are_a_problem() -> None:
    outcome = Outcome(SETTINGS, [record(identical=False)])
    assert outcome.problems() == ["turn 2: the tokens differ from those computed without a cache"]
    assert outcome.summary()["identical"] is False


def test_a_tier_that_did_not_serve_is_a_problem() -> None:
    outcome = Outcome(SETTINGS, [record(tier="storage")])
    assert outcome.problems() == [
        "turn 2: expected something from the storage tier, found tokens: "
        "device 64, host 0, storage 0"
    ]
    assert outcome.summary()["as_expected"] is False


def test_a_cold_turn_that_found_something_is_a_problem() -> None:
    assert Outcome(SETTINGS, [record(tier="")]).problems()
    assert not Outcome(
        SETTINGS, [record(tier="", cached_tokens=dict.fromkeys(TIERS, 0))]
    ).problems()


def test_the_summary_adds_up() -> None:
    host = {"device": 0, "host": 96, "storage": 0}
    turns = [record(), record(turn=3, cached_tokens=host, ttft_s=1.0, logits_margin=0.1)]
    summary = Outcome(SETTINGS, turns).summary()
    assert summary["prompt_tokens"] == 200
    assert summary["cached_tokens"] == {"device": 64, "host": 96, "storage": 0}
    assert (summary["ttft_s"], summary["baseline_ttft_s"]) == (1.5, 8.0)
    assert summary["smallest_logits_margin"] == 0.1


def test_the_plan_has_every_tier_a_restart_and_a_second_conversation() -> None:
    first, second = PROCESSES
    plans = [*first, *second]
    assert [plan.number for plan in plans] == list(range(1, len(plans) + 1))
    assert {plan.tier for plan in plans} == {"", *TIERS}
    assert second[0].tier == "storage"
    assert plans[-1].other_user
    assert sum(not plan.other_user for plan in plans) >= 5
    assert N_STEPS == 16
