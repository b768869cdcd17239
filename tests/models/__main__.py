"""``python -m tests.models``: tries models, and writes docs/models.md when it has tried all."""

from __future__ import annotations

import sys
import time

import click

from tests.models.architectures import ARCHITECTURES, cases_of
from tests.models.findings import Verdict
from tests.models.page import PAGE, with_tables
from tests.models.sweep import sweep

_BAD = (Verdict.WRONG, Verdict.CRASHED, Verdict.MISSED)


@click.command(name="python -m tests.models")
@click.argument("architectures", nargs=-1)
def main(architectures: tuple[str, ...]) -> None:
    """Tries ARCHITECTURES (all, without any), prints each step, and ends with 1 if one is wrong.

    A sweep over all of them writes docs/models.md.
    """
    begin = time.monotonic()
    findings = []
    for finding in sweep(
        case for name in architectures or ARCHITECTURES for case in cases_of(name)
    ):
        findings.append(finding)
        for name, outcome in finding.outcomes():
            click.echo(f"{name}: {outcome.verdict} {outcome.reason}".rstrip())
            for step in outcome.steps if architectures else ():
                click.echo(
                    f"    {step.name}: {step.cached}, apart by {step.apart:.0e} {step.error}"
                )
    if not architectures:
        PAGE.write_text(with_tables(PAGE.read_text(), findings))
    click.echo(f"{len(findings)} models in {time.monotonic() - begin:.0f} s")
    outcomes = [outcome for finding in findings for _, outcome in finding.outcomes()]
    sys.exit(any(outcome.verdict in _BAD for outcome in outcomes))


if __name__ == "__main__":
    main()
