"""The page docs/models.md: what the sweep found, a line for each model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import transformers

from tests.models.findings import Finding, Outcome, Verdict

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

_FROM_TIERS = ("device", "host", "storage")
_PARTLY = ("half", "branch", "shorter", "next turn")

_BEGIN = "<!-- tables: written by `python -m tests.models` -->"
_END = "<!-- end of tables -->"

_COUNTS = """
Of {n_all} architectures of transformers {version}, **{n_identical} are identical in `CachedModel`,
with hits from all three tiers; {n_engine} of them are so in the engine, too**. Some need a setting
that their refusal names. {n_refused} are refused, and {n_not_tried} cannot be tried.
"""
_CACHED = """
## Cached

| model | layers | kept | device, host, storage | half, branch, shorter, turn | engine |
|---|---|---|---|---|---|
"""
_REFUSED = """
## Refused

| model | layers | by | reason |
|---|---|---|---|
"""
_NOT_TRIED = """
## Not tried

| model | reason |
|---|---|
"""


def with_tables(page: str, findings: Sequence[Finding]) -> str:
    """The text of the page with its tables replaced by those of ``findings``."""
    before, rest = page.split(_BEGIN)
    tables = "".join(
        title + "".join(f"{line}\n" for finding in _all(findings) if (line := row(finding)))
        for title, row in (
            (_CACHED, _cached_row),
            (_REFUSED, _refused_row),
            (_NOT_TRIED, _not_tried_row),
        )
    )
    return f"{before}{_BEGIN}\n{_counts(findings)}{tables}\n{_END}{rest.split(_END)[1]}"


def rows_of(findings: Iterable[Finding]) -> Iterator[str]:
    """The lines of the page that tell of these findings."""
    for finding in _all(findings):
        for row in (_cached_row, _refused_row, _not_tried_row):
            if line := row(finding):
                yield line


def architectures_with(
    findings: Iterable[Finding], verdict: Verdict, way: Callable[[Finding], Outcome]
) -> list[str]:
    """The architectures whose default ends with a verdict, when all advice has been followed.

    Args:
        findings: of the sweep.
        verdict: the verdict.
        way: the outcome in ``CachedModel``, or in the engine.
    """
    return [
        finding.case.architecture
        for finding in findings
        if not finding.case.variant and way(finding.final).verdict is verdict
    ]


def _counts(findings: Sequence[Finding]) -> str:
    def count(verdict: Verdict, way: Callable[[Finding], Outcome]) -> int:
        return len(architectures_with(findings, verdict, way))

    return _COUNTS.format(
        n_all=sum(not finding.case.variant for finding in findings),
        version=transformers.__version__,
        n_identical=count(Verdict.IDENTICAL, lambda finding: finding.adapter),
        n_engine=count(Verdict.IDENTICAL, lambda finding: finding.engine),
        n_refused=count(Verdict.REFUSED, lambda finding: finding.adapter),
        n_not_tried=count(Verdict.NOT_TRIED, lambda finding: finding.adapter),
    )


def _all(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings, each followed by what came of its advice."""
    for finding in findings:
        yield finding
        if finding.advice:
            yield from _all([finding.advice])


def _cached_row(finding: Finding) -> str:
    """The line of a model that ``CachedModel`` takes; empty for others."""
    adapter = finding.adapter
    if not adapter.steps:
        return ""
    told = [_told(adapter, names) for names in (_FROM_TIERS, _PARTLY)]
    if adapter.verdict is not Verdict.IDENTICAL:
        told = [f"**{adapter.verdict}**: {adapter.reason}", ""]
    return _row(finding.case, _layers(finding), adapter.kept, *told, _engine(finding))


def _engine(finding: Finding) -> str:
    engine, names = finding.engine, (*_FROM_TIERS, *_PARTLY)
    if engine.verdict is not Verdict.IDENTICAL:
        return (
            "refused"
            if engine.verdict is Verdict.REFUSED
            else f"**{engine.verdict}**: {engine.reason}"
        )
    own = "; ".join(_told(engine, part) for part in (_FROM_TIERS, _PARTLY))
    is_same = _told(engine, names) == _told(finding.adapter, names)
    return f"{'the same' if is_same else own}; {_told(engine, ('together',))}"


def _refused_row(finding: Finding) -> str:
    """The line of a model that is refused, by the engine alone or by both; empty for others."""
    by = {"both": finding.adapter, "the engine": finding.engine}
    for who, outcome in by.items():
        if outcome.verdict is Verdict.REFUSED:
            return _row(finding.case, _layers(finding), who, _reason(outcome))
    return ""


def _not_tried_row(finding: Finding) -> str:
    if finding.adapter.verdict is not Verdict.NOT_TRIED:
        return ""
    return _row(finding.case, _reason(finding.adapter))


def _told(outcome: Outcome, names: Sequence[str]) -> str:
    """How many tokens came from the cache in some steps."""
    steps = {step.name: step for step in outcome.steps}
    return ", ".join(str(steps[name].cached.total) for name in names)


def _layers(finding: Finding) -> str:
    return ", ".join(finding.layers)


def _reason(outcome: Outcome) -> str:
    """A sentence without numbers that depend on the machine."""
    return re.sub(r"\d+%", "… %", outcome.reason)


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
