"""What parts find, as lines of JSON between processes, and as a report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.harness import Row, markdown


@dataclass(frozen=True)
class Check:
    """Something that must hold on a GPU.

    Attributes:
        rule: what must hold.
        held: whether it did.
        note: what was seen.
    """

    rule: str
    held: bool
    note: str = ""


@dataclass(frozen=True)
class Left:
    """Something that was not looked at, and why."""

    what: str
    why: str


Finding: TypeAlias = Row | Check | Left
_KINDS: dict[str, type[Finding]] = {kind.__name__: kind for kind in (Row, Check, Left)}


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        name: of the part.
        ended: ``well``, ``failed`` or ``out of time``.
        seconds: how long it took.
        error: the end of what it printed, if it did not end well.
        findings: what it found until then.
    """

    name: str
    ended: str
    seconds: float
    error: str
    findings: list[Finding]


def to_line(finding: Finding) -> str:
    """One finding as a line of JSON."""
    return json.dumps({"kind": type(finding).__name__, **asdict(finding)}) + "\n"


def from_lines(lines: Iterable[str]) -> list[Finding]:
    """Findings; a last line that was cut short is left out."""
    found = []
    for line in lines:
        if line.endswith("\n"):
            fields = json.loads(line)
            found.append(_KINDS[fields.pop("kind")](**fields))
    return found


def as_json(facts: dict[str, str], outcomes: list[Outcome]) -> str:
    """All of it, raw samples included.

    Args:
        facts: of the machine and the run.
        outcomes: of the parts.
    """
    parts: list[dict[str, Any]] = []
    for outcome in outcomes:
        fields = asdict(outcome)
        fields["findings"] = [json.loads(to_line(finding)) for finding in outcome.findings]
        parts.append(fields)
    return json.dumps({"run": facts, "parts": parts}, indent=1)


def as_page(facts: dict[str, str], outcomes: list[Outcome]) -> str:
    """The tables as Markdown: how the parts ended, what held, what was measured.

    Args:
        facts: of the machine and the run.
        outcomes: of the parts.
    """
    lines = ["# Checks on a GPU", "", f"**{facts['device']}**", "", "| part | ended | seconds |"]
    lines += ["|---|---|---|"]
    lines += [f"| {each.name} | {each.ended} | {each.seconds:.1f} |" for each in outcomes]
    lines += ["", "| part | must hold | held | note |", "|---|---|---|---|"]
    for each in outcomes:
        for found in each.findings:
            if isinstance(found, Check):
                held = "yes" if found.held else "**no**"
                lines.append(f"| {each.name} | {found.rule} | {held} | {found.note} |")
            elif isinstance(found, Left):
                lines.append(f"| {each.name} | {found.what} | left out | {found.why} |")
    rows = [found for each in outcomes for found in each.findings if isinstance(found, Row)]
    for each in outcomes:
        if each.error:
            lines += ["", f"{each.name}, {each.ended}:", "", "```", each.error, "```"]
    return "\n".join([*lines, "", markdown(rows, facts)])


def all_well(outcomes: Iterable[Outcome]) -> bool:
    """Whether every part ended well and everything held."""
    return all(
        each.ended == "well"
        and all(found.held for found in each.findings if isinstance(found, Check))
        for each in outcomes
    )


def write(folder: Path, facts: dict[str, str], outcomes: list[Outcome]) -> None:
    """Writes ``gpu.json`` and ``gpu.md``.

    Args:
        folder: where; it exists.
        facts: of the machine and the run.
        outcomes: of the parts.
    """
    (folder / "gpu.json").write_text(as_json(facts, outcomes))
    (folder / "gpu.md").write_text(as_page(facts, outcomes))
