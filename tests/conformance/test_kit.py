"""The kit itself: right backends pass, and each wrong one fails by its own rule and no other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hicache_core.errors import UseAfterClose
from hicache_core.testing.features import Feature, Target
from hicache_core.testing.harness import Harness, RuleBroken
from hicache_core.testing.kit_settings import KitSettings
from hicache_core.testing.recipe import Recipe, Scope
from hicache_core.testing.report import Report
from hicache_core.testing.rules import RULES
from hicache_core.testing.rules.rule import Rule
from hicache_core.testing.runner import run, run_rule
from tests.conformance import (
    defects,
    defects_data,
    defects_each,
    defects_retention,
    defects_server,
)
from tests.conformance.right import PINNED, STORES, WRITTEN, RichBackend, RightBackend

TINY = KitSettings(
    large_nbytes=2 << 20,
    batch_page_nbytes=4 << 10,
    leak_operations=2000,
    reopenings=4,
    n_threads=3,
    race_nbytes=16 << 10,
    race_s=0.08,
    kills=2,
    full_nbytes=4 << 20,
    quota_nbytes=64 << 10,
    ttl_s=0.1,
    examples=15,
    steps=25,
    rule_s=10.0,
    answer_s=0.5,
)
SECRET = "open-sesame"


def _all_subclasses(cls: type) -> list[type]:
    below: list[type] = cls.__subclasses__()
    return below + [c for sub in below for c in _all_subclasses(sub)]


DEFECTS = [
    cls
    for cls in _all_subclasses(RightBackend)
    if cls.__module__
    in {m.__name__ for m in (defects, defects_data, defects_each, defects_retention)}
    and not cls.__name__.startswith("_")
    and cls is not defects.DirectoryBackend
]
ids = {rule.id for rule in RULES}


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Descriptors and threads that wrong backends leave are released after each test."""
    yield
    defects.END_OF_TESTS.set()
    defects.END_OF_TESTS.clear()
    while defects.DESCRIPTORS:
        os.close(defects.DESCRIPTORS.pop())
    for shared in (STORES, WRITTEN, PINNED):
        shared.clear()


def target_of(cls: type[RightBackend], tmp_path: Path) -> Target:
    """``cls`` with all that the kit can be given for it, but for a server."""
    in_directory = issubclass(cls, defects.DirectoryBackend)
    shared = in_directory or cls is defects.InOneProcessOnly
    store = str(tmp_path) if in_directory else "kit"
    recipe = Recipe.of(
        cls,
        {"store": store, "password": SECRET},
        scope=Scope.SHARED if shared else Scope.PROCESS,
    )
    small = Recipe.of(RightBackend, {"store": "small", "max_nbytes": 1 << 20})
    if (cls.__doc__ or "").strip() in ("full_store", "full_store_each"):
        small = Recipe.of(cls, {"store": "small", "max_nbytes": 1 << 20})
    keeping = cls if issubclass(cls, RichBackend) else RichBackend
    quota = Recipe.of(keeping, {"store": "quota", "quota_nbytes": TINY.quota_nbytes})
    expiring = Recipe.of(keeping, {"store": "expiring", "ttl_s": TINY.ttl_s})
    return Target(recipe, small=small, quota=quota, expiring=expiring)


def failures(report: Report) -> list[str]:
    """Ids of the rules that failed, with what they say."""
    return [f"{r.id}: {r.message}" for r in report.results if r.status == "failed"]


@pytest.mark.parametrize(
    "cls", [RightBackend, RichBackend, defects.DirectoryBackend], ids=lambda c: c.__name__
)
def test_a_right_backend_passes_every_rule_that_applies(
    cls: type[RightBackend], tmp_path: Path
) -> None:
    report = run(target_of(cls, tmp_path), TINY)
    assert failures(report) == []
    assert report.passed
    assert report.figures
    not_run = [r.id for r in report.results if r.status == "not run"]
    server = {r.id for r in RULES if Feature.CONTROL in r.requires}
    shared = {r.id for r in RULES if Feature.SECOND_PROCESS in r.requires}
    assert set(not_run) == (server if cls is defects.DirectoryBackend else server | shared)
    assert STORES["kit"] == {}
    files = (path for path in tmp_path.rglob("*") if path.is_file())
    left = [path for path in files if not path.name.startswith(("tmp", "lock"))]  # of the killed
    assert left == [], "the kit leaves nothing in the store"


@pytest.mark.parametrize("cls", DEFECTS, ids=lambda c: c.__name__)
def test_a_wrong_backend_fails_by_its_rules_and_no_other(
    cls: type[RightBackend], tmp_path: Path
) -> None:
    rule_ids = (cls.__doc__ or "").split()
    assert set(rule_ids) <= set(ids)
    failed = failures(run(target_of(cls, tmp_path), TINY, figures=False))
    assert [line.partition(":")[0] for line in failed] == rule_ids, failed


def test_every_rule_has_a_wrong_backend() -> None:
    found = {rule_id for cls in DEFECTS for rule_id in (cls.__doc__ or "").split()}
    found |= {(cls.__doc__ or "").strip() for cls in defects_server.DEFECTS}
    assert ids - found == set()


def test_rules_name_earlier_rules_only() -> None:
    seen: set[str] = set()
    for rule in RULES:
        assert rule.id not in seen
        assert set(rule.needs) <= seen
        assert rule.text.endswith(".")
        seen.add(rule.id)


class NeverAnswers(RightBackend):
    """Hangs in get."""

    def get(self, key: str) -> bytes | None:
        defects.END_OF_TESTS.wait()
        return None


def test_a_hang_is_a_failure_that_says_where(tmp_path: Path) -> None:
    settings = KitSettings(rule_s=0.2)
    (rule,) = (rule for rule in RULES if rule.id == "get_after_set")
    result = run_rule(rule, target_of(NeverAnswers, tmp_path), settings)
    assert result.status == "failed"
    assert "did not come back within 0.2 s" in result.message
    assert "END_OF_TESTS" not in result.message
    assert "wait" in result.message


class RaisesItsPassword(RightBackend):
    """Has the password in an error."""

    def open(self) -> None:
        assert isinstance(self.settings.password, object)
        raise UseAfterClose(f"redis://me:{SECRET}@host {SECRET}")


def test_a_report_holds_no_secret(tmp_path: Path) -> None:
    report = run(target_of(RaisesItsPassword, tmp_path), TINY)
    assert not report.passed
    assert SECRET not in report.to_json()
    assert SECRET not in "\n".join(report.lines())


def test_a_rule_leaves_no_key_in_the_store(tmp_path: Path) -> None:
    target = target_of(RightBackend, tmp_path)
    for rule in RULES[:20]:
        run_rule(rule, target, TINY)
        assert STORES["kit"] == {}, rule.id


def test_a_rule_closes_what_it_opened_when_it_fails(tmp_path: Path) -> None:
    opened: list[RightBackend] = []

    def check(h: Harness) -> None:
        for backend in (h.backend, h.another()):
            assert isinstance(backend, RightBackend)
            opened.append(backend)
        raise RuleBroken("on purpose")

    rule = Rule("broken", "Broken.", check)
    assert run_rule(rule, target_of(RightBackend, tmp_path), TINY).status == "failed"
    assert [backend.is_open for backend in opened] == [False, False]
