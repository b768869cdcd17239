"""The picture of a sweep: hit rates over a size, and times to first token over the servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hicache_core.errors import ConfigError

SIZES = ("host_gb", "storage_gb", "device_gb")
STYLES = {"p50": "-", "p90": "--", "p99": ":"}
Row = Mapping[str, Any]


def draw(rows: Sequence[Row], file: Path) -> None:
    """Writes the picture.

    Args:
        rows: results as ``Result.as_json`` has them, with the name of the trace as ``trace``.
        file: the file to write; its suffix decides the format.

    Raises:
        ConfigError: no request was served.
    """
    rows = [one for one in rows if one["requests"]]  # else nothing of it can be drawn
    if not rows:
        raise ConfigError("nothing to draw: all requests were refused")
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    hits, times = figure.subplots(1, 2)
    size = _varied(rows)
    for label, members in _lines(rows, size).items():
        points = sorted((one["setting"][size], one["hit_rate"]) for one in members)
        hits.plot(*zip(*points, strict=True), marker="o", label=label)
    hits.set(xlabel=f"{size.removesuffix('_gb')} tier (GB)", ylabel="hit rate")
    hits.set_ylim(0, 1.15 * max(one["hit_rate"] for one in rows) or 1)
    for n, (label, members) in enumerate(_lines(rows, "servers").items()):
        for share, style in STYLES.items():
            points = sorted((one["setting"]["servers"], one["ttft_s"][share]) for one in members)
            name = label if share == "p50" else None
            times.plot(*zip(*points, strict=True), style, marker=".", color=f"C{n}", label=name)
    times.set(
        xlabel="servers",
        ylabel="time to first token (s): p50 –, p90 - -, p99 ···",
        yscale="log",
        xticks=sorted({one["setting"]["servers"] for one in rows}),
    )
    for axes in (hits, times):
        axes.grid(alpha=0.3)
        if any(axes.get_legend_handles_labels()[1]):
            axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def _varied(rows: Sequence[Row]) -> str:
    """The size of which there are most values."""
    return max(SIZES, key=lambda name: len({one["setting"][name] for one in rows}))


def _lines(rows: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    """Rows that belong to one line, by what tells it from the others; not those without limit."""
    names = ("servers", *SIZES, "router", "eviction")
    told = [name for name in names if len({one["setting"][name] for one in rows}) > 1]
    has_traces = len({one["trace"] for one in rows}) > 1
    found: dict[str, list[Row]] = {}
    for one in rows:
        setting = one["setting"]
        parts = [_part(name, setting[name]) for name in told if name != axis]
        label = ", ".join([one["trace"], *parts] if has_traces else parts)
        if setting[axis] is not None:
            found.setdefault(label, []).append(one)
    return found


def _part(name: str, value: Any) -> str:
    shown = "no limit" if value is None else f"{value:g}" if isinstance(value, float) else value
    return f"{name.removesuffix('_gb')} {shown}"
