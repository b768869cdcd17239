"""The demo as a picture: time to first token by turn, with and without the cache."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from hicache_core.demo.records import TIERS, Outcome, TurnRecord

COLOURS = {"": "#8c8c8c", "device": "#2a9d4e", "host": "#e0a100", "storage": "#2878b5"}
NAMES = {
    "": "with HiCache, cold",
    "device": "with HiCache, prefix on the device",
    "host": "with HiCache, prefix in host memory",
    "storage": "with HiCache, prefix in storage",
}
NO_CACHE_COLOUR = "#d9d9d9"
BAR_WIDTH = 0.38


def draw(outcome: Outcome, file: Path) -> None:
    """Writes the picture, in the format that the file's suffix names."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(outcome.turns))
    baseline = axes.bar(
        [x - BAR_WIDTH / 2 for x in places],
        [turn.baseline_ttft_s for turn in outcome.turns],
        BAR_WIDTH,
        color=NO_CACHE_COLOUR,
        label="no cache",
    )
    axes.bar_label(
        baseline,
        [f"{turn.baseline_ttft_s:.2f} s" for turn in outcome.turns],
        padding=2,
        fontsize=9,
        color="#777777",
    )
    named: set[str] = set()
    for x, turn in zip(places, outcome.turns, strict=True):
        tier = main_tier(turn)
        label = NAMES[tier] if tier not in named else None
        named.add(tier)
        bars = axes.bar(
            [x + BAR_WIDTH / 2], [turn.ttft_s], BAR_WIDTH, color=COLOURS[tier], label=label
        )
        axes.bar_label(bars, [f"{turn.ttft_s:.2f} s"], padding=2, fontsize=9)
    axes.set_xticks(
        list(places),
        [
            f"turn {turn.turn}\n{turn.label}\n{sum(turn.cached_tokens.values())} of "
            f"{turn.prompt_tokens} tokens"
            for turn in outcome.turns
        ],
        fontsize=8,
    )
    axes.set_ylabel("time to first token, s")
    axes.set_title(_title(outcome))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)


def main_tier(turn: TurnRecord) -> str:
    """The tier that gave most tokens; empty if none gave any."""
    best = max(TIERS, key=lambda tier: turn.cached_tokens[tier])
    return best if turn.cached_tokens[best] else ""


def _title(outcome: Outcome) -> str:
    summary = outcome.summary()
    return (
        f"{summary['model']}, {summary['dtype']}, {summary['threads']} CPU threads, "
        f"storage backend: {summary['backend']}"
    )
