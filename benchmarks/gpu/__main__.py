"""Checks and measures the CUDA code on a machine with a GPU and no network, within six minutes.

    python -m benchmarks.gpu [--wheels FOLDER] [--out FOLDER] [--only PART ...]
    python -m benchmarks.gpu --dry-run          on the CPU, sizes shrunk: nothing is measured
    python -m benchmarks.gpu --what-to-bring    what this Python lacks
    python -m benchmarks.gpu --bring FOLDER     fetches that, where there is a network

Each part is a process that is ended at its deadline. No setting of the device is changed. Imports
the standard library only until missing wheels are unpacked.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu import wheels
from benchmarks.gpu.plan import PARTS, TOTAL_S, Part

if TYPE_CHECKING:
    from benchmarks.gpu.report import Outcome

_LAST_LINES = 25


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 if all parts ended well and everything held, 1 if not, 2 if
    nothing could be tried."""
    asked = _parser().parse_args(arguments)
    if asked.what_to_bring:
        print(wheels.what_to_bring())
        return 0
    try:
        if asked.bring is not None:
            wheels.download(asked.bring, asked.python, asked.names)
            return 0
        with tempfile.TemporaryDirectory(prefix="hicache-gpu-") as scratch:
            return _checked(asked, Path(scratch))
    except wheels.WheelsMissing as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--wheels", type=Path, default=wheels.REPOSITORY / "gpu-wheels", metavar="FOLDER")
    add("--out", type=Path, default=wheels.REPOSITORY / "benchmarks/results", metavar="FOLDER")
    add("--only", action="append", choices=[part.name for part in PARTS], metavar="PART")
    add("--dry-run", action="store_true")
    add("--what-to-bring", action="store_true")
    add("--bring", type=Path, metavar="FOLDER")
    add("--python", default="3.12", metavar="VERSION", help="with --bring: of the GPU machine")
    add("names", nargs="*", metavar="PACKAGE", help="with --bring: what is missing there")
    return parser


def _checked(asked: argparse.Namespace, scratch: Path) -> int:
    began = time.monotonic()
    site = scratch / "site"
    for name in wheels.supply(asked.wheels, site):
        print(f"unpacked {name}")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of the parts

    from benchmarks.gpu import report

    facts = _facts(asked.dry_run)
    if facts is None:
        return 2
    print(f"benchmarks.gpu: {facts['device']}")
    asked.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for part in PARTS:
        if not asked.only or part.name in asked.only:
            print(f"{part.name}: {part.what} …", flush=True)
            left_s = TOTAL_S - (time.monotonic() - began)
            outcomes.append(run_part(part, left_s, asked.dry_run, scratch, asked.out))
            print(f"{part.name}: {outcomes[-1].ended} after {outcomes[-1].seconds:.1f} s")
            report.write(asked.out, facts, outcomes)  # whatever comes next, this is kept
    print((asked.out / "gpu.md").read_text())
    return 0 if report.all_well(outcomes) else 1


def _facts(dry_run: bool) -> dict[str, str] | None:
    """The machine and the run; None if there is no GPU, and the CPU was not asked for."""
    code = "from benchmarks.gpu.place import device_facts; import json; " + (
        f"print(json.dumps(device_facts(dry={dry_run})))"
    )
    try:
        told = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
        )
    except subprocess.CalledProcessError as error:
        print(error.stderr.strip().splitlines()[-1], file=sys.stderr)
        return None
    except subprocess.TimeoutExpired as error:
        print(f"torch did not say within {error.timeout:.0f} s which GPU there is", file=sys.stderr)
        return None
    import json

    from benchmarks.harness import machine

    device: dict[str, str] = json.loads(told.stdout.splitlines()[-1])
    return {**device, **machine()}


def run_part(part: Part, left_s: float, dry_run: bool, scratch: Path, out: Path) -> Outcome:
    """Runs a part in a process of its own, which is ended at its deadline.

    Args:
        part: which.
        left_s: what is left of the time of all parts.
        dry_run: on the CPU; nobody pays for the machine then, and the deadline is three times as
            long.
        scratch: an empty folder, or one of earlier parts.
        out: where the part may leave files for the report.
    """
    from benchmarks.gpu import report

    lines, log = scratch / f"{part.name}.jsonl", scratch / f"{part.name}.log"
    lines.touch()
    command = [sys.executable, "-m", "benchmarks.gpu.part", part.name, str(lines), str(out)]
    command += ["--dry-run"] if dry_run else []
    deadline_s = 3.0 * part.deadline_s if dry_run else min(part.deadline_s, left_s)
    began = time.monotonic()
    with log.open("w") as output:
        ended = run_until(command, deadline_s, output.fileno(), scratch)
    said = "" if ended == "well" else "\n".join(log.read_text().splitlines()[-_LAST_LINES:])
    with lines.open() as found:
        return report.Outcome(
            part.name, ended, time.monotonic() - began, said, report.from_lines(found)
        )


def run_until(command: list[str], deadline_s: float, output: int, scratch: Path) -> str:
    """Runs a command and ends it, with all its children, at its deadline.

    Args:
        command: what to run.
        deadline_s: seconds; nothing is started if there are none.
        output: file descriptor that it writes to.
        scratch: where its temporary files go.

    Returns:
        ``well``, ``failed`` or ``out of time``.
    """
    if deadline_s <= 0:
        return "out of time"
    files = Path(tempfile.mkdtemp(dir=scratch))
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=output,
        start_new_session=True,
        cwd=wheels.REPOSITORY,
        env={**os.environ, "TMPDIR": str(files)},
    )
    try:
        return "failed" if process.wait(deadline_s) else "well"
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(files, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
