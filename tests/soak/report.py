"""The figures of a soak as JSON, and as the section of ``docs/reliability.md``."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import asdict
from pathlib import Path

from tests.soak.run import Report

_SECTION = re.compile(r"^## Soak\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
MIB = 1 << 20


def quantile(values: list[float], share: float) -> float:
    """The value that ``share`` of all do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def as_json(report: Report) -> str:
    """All figures; of the latencies their quantiles."""
    figures = asdict(report) | {
        "requests": len(report.latencies_s),
        "latencies_s": {
            f"p{100 * share:g}": quantile(report.latencies_s, share) for share in (0.5, 0.99, 0.999)
        }
        | {"max": max(report.latencies_s)},
        "waits_s": {"max": max(report.waits_s)},
    }
    return json.dumps(figures, indent=2)


def as_markdown(report: Report) -> str:
    """The section ``## Soak``."""
    n_served = sum(n for tier, n in report.pages.items() if tier != "computed")
    latencies_ms = [quantile(report.latencies_s, share) * 1e3 for share in (0.5, 0.99, 1.0)]
    lines = [
        "## Soak",
        "",
        f"`make soak SOAK_SECONDS={report.plan.seconds:g}` on {os.cpu_count()} cores "
        f"({platform.machine()}), Python {platform.python_version()}. One engine runs requests of "
        "three tenants on a small cache, and every byte of every page that it is served is "
        "checked. Meanwhile the file store and a Valkey server are swapped, detached and attached, "
        "and are slow, failing, corrupt, full and stuck in turns and at once; the server is killed "
        "and frozen; the cache is closed and opened again.",
        "",
        "| measure | value |",
        "|---|---|",
        f"| requests | {len(report.latencies_s):,} |",
        f"| pages served, every byte right | {n_served:,} |",
        f"| pages by where they came from | {_counts(report.pages)} |",
        f"| faults that struck | {_counts(report.faults)} |",
        f"| the server | {_counts(report.server)} |",
        f"| the storage tier | {_counts(report.events)} |",
        f"| request, p50 / p99 / longest | {' / '.join(f'{ms:.0f}' for ms in latencies_ms)} ms |",
        f"| of that, longest wait for storage | {max(report.waits_s) * 1e3:.0f} ms |",
        f"| close, longest of {len(report.closes_s)} | {max(report.closes_s):.2f} s |",
        "",
        "Medians of the second and of the last fifth of the time, and the highest sample:",
        "",
        "| measure | early | late | highest |",
        "|---|---|---|---|",
    ]
    for figure in report.growth:
        values = (figure.early, figure.late, figure.highest)
        if figure.name.endswith("_nbytes"):
            cells = [f"{value / MIB:.1f} MiB" for value in values]
        else:
            cells = [f"{value:g}" for value in values]
        name = figure.name.removeprefix("n_").replace("resident_nbytes", "memory (RSS)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    outcome = "; ".join(report.problems) or "no wrong byte, no growth, no request beyond its bound"
    return "\n".join([*lines, "", f"Outcome: {outcome}.", ""])


def write_section(page: Path, section: str) -> None:
    """Replaces the section in ``page``, or adds it; makes the page if there is none."""
    text = page.read_text() if page.exists() else "# Reliability\n\n"
    if _SECTION.search(text):
        text = _SECTION.sub(lambda _: section + "\n", text)
    else:
        text = f"{text.rstrip()}\n\n{section}"
    page.write_text(text.rstrip() + "\n")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items())) or "none"
