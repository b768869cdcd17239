"""``python -m tests.soak``: a soak, its figures, and exit status 1 if it failed."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.soak.report import as_json, as_markdown, write_section
from tests.soak.run import Plan, run


def main() -> None:
    """Runs it as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--docs", type=Path, help="write the section `## Soak` of this page")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hicache-soak-") as directory:
        report = run(Plan(given.seconds, given.seed), Path(directory))
    print(as_markdown(report))
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(as_json(report) + "\n")
    if given.docs is not None:
        write_section(given.docs, as_markdown(report))
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()
