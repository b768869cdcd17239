"""The report of a run of the kit, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from hicache_core.testing.rules.rule import Rule

Status = Literal["passed", "failed", "not run", "not implemented"]

_TITLES = {"base": "Base: must pass", "capability": "Capabilities: must pass where implemented"}


@dataclass(frozen=True, slots=True)
class RuleResult:
    """The result of one rule.

    Attributes:
        id: the rule's id.
        level: base or capability.
        text: the rule in a sentence.
        status: how it ended.
        message: the reason, unless it passed.
        elapsed_s: seconds that it took.
    """

    id: str
    level: str
    text: str
    status: Status
    message: str = ""
    elapsed_s: float = 0.0

    @classmethod
    def of(
        cls, rule: Rule, status: Status, message: str = "", elapsed_s: float = 0.0
    ) -> RuleResult:
        """The result of one rule.

        Args:
            rule: the rule.
            status: how it ended.
            message: why it failed or was not run.
            elapsed_s: seconds that it took.
        """
        return cls(rule.id, rule.level, rule.text, status, message, round(elapsed_s, 3))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured value, without a verdict."""

    what: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run.

    Attributes:
        backend: the backend's name.
        results: one for each rule, in the order of the run.
        figures: the measured values; empty if a rule failed.
    """

    backend: str
    results: Sequence[RuleResult]
    figures: Sequence[Measurement] = ()

    @property
    def passed(self) -> bool:
        """Whether no rule failed. Rules are only left out because another one failed."""
        return all(result.status != "failed" for result in self.results)

    def to_json(self) -> str:
        """The report as JSON, stable enough to be compared."""
        return json.dumps({**asdict(self), "passed": self.passed}, indent=2)

    def lines(self) -> Iterator[str]:
        """The report as text."""
        for level, title in _TITLES.items():
            yield title
            for result in self.results:
                if result.level == level:
                    yield from _result_lines(result)
            yield ""
        if self.figures:
            yield "Performance: measured, no verdict"
            width = max(len(m.what) for m in self.figures)
            for m in self.figures:
                yield f"  {m.what:{width}}  {m.value:10,.4g} {m.unit}"
            yield ""
        yield self.summary()

    def summary(self) -> str:
        """One line: how many rules ended how."""
        counts = {
            status: sum(result.status == status for result in self.results)
            for status in ("passed", "failed", "not run", "not implemented")
        }
        told = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        verdict = "conforms" if self.passed else "does not conform"
        return f"backend {self.backend!r} {verdict}: {told}"


def _result_lines(result: RuleResult) -> Iterator[str]:
    mark = {"passed": "ok", "failed": "FAILED", "not run": "not run"}.get(result.status, "-")
    yield f"  {mark:8} {result.id:28} {result.text}"
    if result.message:
        yield f"  {'':8} {'':28} {result.message}"
