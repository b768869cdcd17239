"""The view of ``hicache bench``: the results of a run on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

SOURCES = {"cache": "counted by the cache", "replies": "from the replies"}


def results(title: str, figures: Mapping[str, Any]) -> RenderableType:
    """The summary, and a table with one row for each round if there are several."""
    lines = Text("\n".join(_lines(title, figures)) + "\n")
    return Group(lines, _rounds(figures)) if len(figures["rounds"]) > 1 else lines


def _lines(title: str, figures: Mapping[str, Any]) -> Iterator[str]:
    yield title
    failed = f", {figures['failed']} failed" if figures["failed"] else ""
    yield f"requests      {figures['requests']}{failed} in {figures['elapsed_s']:.1f} s"
    yield f"TTFT          {_spread(figures['ttft_s'])}"
    yield f"latency       {_spread(figures['latency_s'])}"
    yield (
        f"throughput    {figures['requests_per_s']:.2f} requests/s, "
        f"{figures['output_tokens_per_s']:.1f} output tokens/s"
    )
    prompt, cached = figures["prompt_tokens"], figures["cached_tokens"]
    yield f"prompts       {prompt:,} tokens, {cached:,} reported as cached"
    if figures["hit_tokens_source"]:
        hits = ", ".join(f"{tier} {n:,}" for tier, n in figures["hit_tokens"].items())
        yield f"hit tokens    {hits} ({SOURCES[figures['hit_tokens_source']]})"
    else:
        yield "hit tokens    the server does not report them by tier"


def _rounds(figures: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("ROUND", "REQUESTS", "TTFT P50", "TTFT P99", "PROMPT TOKENS", "CACHED"):
        table.add_column(name, justify="right")
    for one in figures["rounds"]:
        table.add_row(
            str(one["round"] + 1),
            str(one["requests"]),
            _seconds(one["ttft_s"]["p50"]),
            _seconds(one["ttft_s"]["p99"]),
            f"{one['prompt_tokens']:,}",
            f"{one['cached_tokens']:,}",
        )
    return table


def _spread(spread: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_seconds(spread[name])}" for name in ("p50", "p90", "p99", "mean"))


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f} s"
