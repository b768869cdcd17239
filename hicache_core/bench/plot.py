"""The picture of a run: time to first token by request, and where prompt tokens came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hicache_core.bench.result import Record

COLOURS = {"device": "#2f7de1", "host": "#1a9b78", "storage": "#d9822b", "computed": "#9aa4b2"}


def draw(title: str, records: Sequence[Record], figures: Mapping[str, Any], file: Path) -> None:
    """Writes the picture of a run.

    Args:
        title: heading of the picture.
        records: the requests of the run.
        figures: the summary that ``result.summary`` made of them.
        file: the file to write; its suffix decides the format.
    """
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    times, tokens = figure.subplots(1, 2, width_ratios=(3, 1))
    timed = [record for record in records if record.reply.ttft_s is not None]
    rounds = sorted({record.round for record in timed})
    for n in rounds:
        mine = [record for record in timed if record.round == n]
        times.scatter(
            [record.sent_s for record in mine],
            [record.reply.ttft_s for record in mine],
            s=16,
            label=f"round {n + 1}",
        )
    for share in ("p50", "p99"):
        if (value := figures["ttft_s"][share]) is not None:
            times.axhline(value, color="#777777", linewidth=0.8, linestyle="--")
            times.annotate(
                f"{share} {value:.3f} s",
                (0.99, value),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
                color="#555555",
            )
    times.margins(y=0.12)
    times.set(xlabel="sent after (s)", ylabel="time to first token (s)", ylim=(0, None))
    if 1 < len(rounds) <= 10:
        times.legend(fontsize=8)
    _bars(tokens, figures)
    figure.savefig(file, dpi=110)


def _bars(axes: Any, figures: Mapping[str, Any]) -> None:
    hits = dict(figures["hit_tokens"])
    computed = max(0, figures["prompt_tokens"] - sum(hits.values()))
    parts = hits | {"computed": computed}
    bars = axes.bar(list(parts), list(parts.values()), color=[COLOURS[name] for name in parts])
    axes.bar_label(bars, [f"{n:,}" for n in parts.values()], fontsize=8)
    axes.set(ylabel="prompt tokens")
    axes.tick_params(axis="x", labelrotation=30)
