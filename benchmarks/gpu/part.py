"""One part in a process of its own: ``python -m benchmarks.gpu.part NAME LINES OUT [--dry-run]``.

It writes each finding to the file LINES as soon as it has it.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Finding, to_line
from benchmarks.harness import Row


def main(name: str, lines: Path, out: Path, *, dry: bool) -> None:
    """Runs the part.

    Args:
        name: of its module.
        lines: file that gets a line of JSON for each finding.
        out: folder for other files of the report.
        dry: on the CPU, Triton by its interpreter.
    """
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from benchmarks.gpu.place import Place

    module: Any = importlib.import_module(f"benchmarks.gpu.{name}")
    with lines.open("a") as file:
        for finding in module.run(Place(dry, out)):
            file.write(to_line(_named_dry(finding) if dry else finding))
            file.flush()


def _named_dry(finding: Finding) -> Finding:
    """So that a row of a dry run is no measurement, wherever it ends up."""
    if isinstance(finding, Row):
        return replace(finding, table=f"dry run on the CPU: {finding.table}")
    return finding


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), dry="--dry-run" in sys.argv)
