"""The picture of a sweep: hit rates over a size, and times to first token over the servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hicache_core.fleet.result import SHARES

SIZES = ("host_gb", "storage_gb", "device_gb")
Row = Mapping[str, Any]


def draw(rows: Sequence[Row], file: Path) -> None:
    """Writes the picture.

    Args:
        rows: results as ``Result.as_json`` has them, with the name of the trace as ``trace``.
        file: the file to write; its suffix decides the format.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    hits, times = figure.subplots(1, 2)
    size = _varied(rows)
    for label, members in _lines(rows, size).items():
        points = sorted((one["setting"][size], one["hit_rate"]) for one in members)
        hits.plot(*zip(*points, strict=True), marker="o", label=label)
    hits.set(xlabel=f"{size.removesuffix('_gb')} tier (GB)", ylabel="hit rate", ylim=(0, 1))
    for label, members in _lines(rows, "servers").items():
        for share in SHARES:
            points = sorted((one["setting"]["servers"], one["ttft_s"][share]) for one in members)
            name = f"{share} {label}".rstrip()
            times.plot(*zip(*points, strict=True), marker="o", label=name)
    times.set(xlabel="servers", ylabel="time to first token (s)", yscale="log")
    for axes in (hits, times):
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def _varied(rows: Sequence[Row]) -> str:
    """The size of which there are most values."""
    return max(SIZES, key=lambda name: len({one["setting"][name] for one in rows}))


def _lines(rows: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    """Rows that belong to one line, by what tells it from the others."""
    names = ("servers", *SIZES, "router", "eviction")
    told = [name for name in names if len({one["setting"][name] for one in rows}) > 1]
    found: dict[str, list[Row]] = {}
    for one in rows:
        setting = one["setting"]
        parts = [f"{name.removesuffix('_gb')} {setting[name]}" for name in told if name != axis]
        if len({other["trace"] for other in rows}) > 1:
            parts.insert(0, one["trace"])
        if setting[axis] is not None:
            found.setdefault(", ".join(parts), []).append(one)
    return found
