"""Runs benchmarks, prints them as tables and keeps the raw samples as JSON.

    python -m benchmarks [--quick] [--only NAME ...] [--json FILE] [--docs FILE]

A benchmark is a module of this package with ``rows(quick: bool) -> Iterator[Row]``. Wall time and
CPU time are shown side by side, since machines are shared and noisy; compare ratios inside one run.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

TABLES_BEGIN = "<!-- tables: written by `make docs` -->"
TABLES_END = "<!-- end of tables -->"


@dataclass(frozen=True)
class Row:
    """One measured line.

    Attributes:
        table: the title of its table.
        name: what was measured.
        unit: unit of the samples, for instance ``us``, ``MB/s`` or ``M tokens/s``.
        samples: one value for each repetition, by wall clock.
        cpu_samples: the same by CPU time of the process, or empty.
        baseline: name of the row of the same table to compare with.
        target: the target in words, if there is one.
        note: anything the reader must know.
    """

    table: str
    name: str
    unit: str
    samples: list[float]
    cpu_samples: list[float] = field(default_factory=list)
    baseline: str | None = None
    target: str | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """Median of the wall-clock samples."""
        return statistics.median(self.samples)


def measure(
    fn: Callable[[], object],
    *,
    repeat: int,
    number: int = 1,
    setup: Callable[[], object] | None = None,
) -> tuple[list[float], list[float]]:
    """Measures wall time and CPU time of ``fn``, with the garbage collector off.

    Args:
        fn: what to measure.
        repeat: number of samples.
        number: calls in one sample; a sample is their mean.
        setup: called once before each sample, not measured.

    Returns:
        Seconds for one call: the samples of wall time, and of the CPU time of all threads of the
        process.
    """
    wall: list[float] = []
    cpu: list[float] = []
    for _ in range(repeat):
        if setup is not None:
            setup()
        gc.collect()
        gc.disable()
        try:
            cpu_start, start = time.process_time(), time.perf_counter()
            for _ in range(number):
                fn()
            end, cpu_end = time.perf_counter(), time.process_time()
        finally:
            gc.enable()
        wall.append((end - start) / number)
        cpu.append((cpu_end - cpu_start) / number)
    return wall, cpu


class InTurn:
    """Samples of calls that are made in turn, so that all of them see the same machine."""

    def __init__(self) -> None:
        """Has no sample yet."""
        self._samples: dict[tuple[str, str], tuple[list[float], list[float]]] = {}

    def call(self, name: str, what: str, fn: Callable[[], object], *, counts: bool) -> None:
        """Measures one call.

        Args:
            name: who is called.
            what: what for.
            fn: the call.
            counts: False for a call that only warms up.
        """
        wall, cpu = measure(fn, repeat=1)
        if counts:
            of_row = self._samples.setdefault((name, what), ([], []))
            of_row[0].extend(wall)
            of_row[1].extend(cpu)

    def row(self, table: str, name: str, what: str, baseline: str, target: str | None) -> Row:
        """Returns the samples of one name and purpose in milliseconds.

        Args:
            table: the title of its table.
            name: who was called.
            what: what for.
            baseline: as ``Row.baseline``.
            target: as ``Row.target``.
        """
        wall, cpu = ([1e3 * seconds for seconds in one] for one in self._samples[name, what])
        return Row(table, name, "ms", wall, cpu, baseline, target)


def machine() -> dict[str, str]:
    """The machine, kernel, Python and date of a run."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_kib / 2**20:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def number_text(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(row: Row, rows: Iterable[Row]) -> list[str]:
    """The row's columns: name, median, spread, CPU median, ratio, target, note."""
    cpu = number_text(statistics.median(row.cpu_samples)) if row.cpu_samples else "–"
    ratio = "–"
    if row.baseline is not None:
        base = next(other for other in rows if other.name == row.baseline)
        ratio = f"{row.median / base.median:.2f} × {row.baseline}"
    spread = f"{number_text(min(row.samples))}–{number_text(max(row.samples))}"
    median = f"{number_text(row.median)} {row.unit}"
    return [row.name, median, spread, cpu, ratio, row.target or "–", row.note]


HEADER = ["row", "median", "min–max", "by CPU time", "ratio", "target", "note"]


def by_table(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped by table, in order of appearance."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(row.table, []).append(row)
    return tables


def markdown(rows: list[Row], facts: dict[str, str]) -> str:
    """The tables as Markdown, the machine named above them."""
    lines = ["Machine: " + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".", ""]
    for title, members in by_table(rows).items():
        lines += [f"### {title}", "", "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
        lines += ["| " + " | ".join(cells(row, members)) + " |" for row in members]
        lines.append("")
    return "\n".join(lines)


def with_tables(page: str, tables: str) -> str:
    """``page`` with ``tables`` between its two markers."""
    head, _, rest = page.partition(TABLES_BEGIN)
    _, end, tail = rest.partition(TABLES_END)
    if not end:
        raise ValueError(f"the page lacks {TABLES_BEGIN} and {TABLES_END}")
    return f"{head}{TABLES_BEGIN}\n\n{tables}\n{TABLES_END}{tail}"


def benchmark_names() -> list[str]:
    """Every benchmark module of this package."""
    package = Path(__file__).parent
    skip = {"contest", "harness", "__main__"}
    return sorted(m.name for m in pkgutil.iter_modules([str(package)]) if m.name not in skip)


def run(names: Iterable[str], *, quick: bool, console: Console) -> Iterator[Row]:
    """Runs benchmarks and prints each table as soon as it is complete.

    Args:
        names: modules of this package that have ``rows(quick)``.
        quick: fewer and shorter samples.
        console: where tables are printed.
    """
    for name in names:
        module: Any = importlib.import_module(f"benchmarks.{name}")
        rows: list[Row] = []
        with console.status(f"{name} …"):
            rows.extend(module.rows(quick))
        for title, members in by_table(rows).items():
            table = Table(*HEADER, title=title)
            for row in members:
                table.add_row(*cells(row, members))
            console.print(table)
        yield from rows


def run_alone(name: str) -> None:
    """Runs one benchmark of an engine, by the engine's own Python; ``--quick`` if it is given.

    Args:
        name: of its module.
    """
    console = Console(width=None if os.isatty(1) else 180)
    console.print(machine())
    for _ in run([name], quick="--quick" in sys.argv[1:], console=console):
        pass


@click.command()
@click.option("--quick", is_flag=True, help="Fewer repetitions and smaller data.")
@click.option("--only", multiple=True, help="Run just this benchmark (may be repeated).")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write raw samples.")
@click.option("--docs", type=click.Path(path_type=Path), help="Replace the tables of this page.")
def main(quick: bool, only: tuple[str, ...], json_file: Path | None, docs: Path | None) -> None:
    """Prints tables: median, spread, CPU time, ratio."""
    known = benchmark_names()
    unknown = [name for name in only if name not in known]
    if unknown:
        raise click.UsageError(f"no benchmark {unknown[0]!r}; there are: {', '.join(known)}")
    facts = machine()
    console = Console(width=None if os.isatty(1) else 180)
    console.print(facts)
    rows: list[Row] = []
    for name in only or known:
        rows += run([name], quick=quick, console=console)
        if json_file is not None:  # after each, so that an interrupted run keeps what it has
            json_file.parent.mkdir(parents=True, exist_ok=True)
            report = {"machine": facts, "quick": quick, "rows": [asdict(row) for row in rows]}
            json_file.write_text(json.dumps(report, indent=1))
        if docs is not None:
            docs.write_text(with_tables(docs.read_text(), markdown(rows, facts)))
