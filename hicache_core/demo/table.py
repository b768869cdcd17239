"""The demo on a terminal: a table that grows with the turns, and what the model is doing now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hicache_core.demo.plan import N_STEPS
from hicache_core.demo.records import TIERS, Event, Facts, Note, Outcome, Step, TurnRecord

COLOURS = {"": "white", "device": "green", "host": "yellow", "storage": "cyan"}


class Board:
    """What has happened so far, as something that rich can draw."""

    def __init__(self) -> None:
        """Nothing has."""
        self._table = _empty_table()
        self._notes: list[Text] = []
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("step {task.completed} of {task.total}"),
            TimeElapsedColumn(),
        )
        self._task = self._progress.add_task("starting", total=N_STEPS)
        self._n_steps = 0

    def add(self, event: Event) -> None:
        """Takes in an event."""
        match event:
            case TurnRecord():
                self._table.add_row(*_cells(event))
            case Step():
                self._n_steps += 1
                self._progress.update(self._task, description=event.text, completed=self._n_steps)
            case Note():
                self._notes.append(Text(event.text, style="dim"))
            case _:
                pass

    def __rich__(self) -> RenderableType:
        """The table, the notes, the progress."""
        return Group(self._table, *self._notes, self._progress)


@contextmanager
def shown(console: Console) -> Iterator[Callable[[Event], None]]:
    """Shows events as they come: live on a terminal, one line each elsewhere."""
    if not console.is_terminal:
        yield lambda event: _print_line(console, event)
        return
    board = Board()
    with Live(board, console=console, refresh_per_second=8, transient=True):
        yield board.add


def _print_line(console: Console, event: Event) -> None:
    match event:
        case TurnRecord():
            tiers = " ".join(f"{tier} {event.cached_tokens[tier]}" for tier in TIERS)
            line = (
                f"turn {event.turn} ({event.label}) done: process {event.pid}, prompt "
                f"{event.prompt_tokens}, found {tiers}, first token after {event.ttft_s:.2f} s, "
                f"without cache {event.baseline_ttft_s:.2f} s, "
                f"{'identical' if event.identical else 'DIFFERENT'}"
            )
        case Step() | Note():
            line = event.text
        case Facts():
            line = f"process {event.pid}: {event.model}, {event.dtype}"
        case _:
            return
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_outcome(console: Console, outcome: Outcome) -> None:
    """Prints the table, the conversation and the summary."""
    if console.is_terminal:
        table = _empty_table()
        for turn in outcome.turns:
            table.add_row(*_cells(turn))
        console.print(table)
    for turn in outcome.turns:
        console.print(f"{turn.turn}. {turn.question}", style="bold", markup=False, highlight=False)
        console.print(f"   {turn.answer}", markup=False, highlight=False, soft_wrap=True)
    for line in summary_lines(outcome):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for problem in outcome.problems():
        console.print(f"FAILED: {problem}", style="bold red", markup=False, soft_wrap=True)


def summary_lines(outcome: Outcome) -> list[str]:
    """The summary in words."""
    summary = outcome.summary()
    in_force = summary["in_force"]
    cached, prompt = summary["cached_tokens"], summary["prompt_tokens"]
    share = sum(cached.values()) / prompt if prompt else 0.0
    n_identical = sum(turn.identical for turn in outcome.turns)
    return [
        f"{summary['model']}, {summary['dtype']}, {summary['threads']} threads; backend "
        f"{summary['backend']}, page {in_force.get('page_size')}, {in_force.get('mem_layout')}, "
        f"{in_force.get('io_backend')}, {in_force.get('write_policy')}",
        f"found in the cache: {sum(cached.values())} of {prompt} prompt tokens ({share:.0%}): "
        + ", ".join(f"{tier} {cached[tier]}" for tier in TIERS),
        f"time to first token, all turns: {summary['ttft_s']:.2f} s with the cache, "
        f"{summary['baseline_ttft_s']:.2f} s without; behind it "
        f"{summary['decode_tokens_per_s']:.1f} and "
        f"{summary['baseline_decode_tokens_per_s']:.1f} tokens/s",
        f"tokens identical to those computed without a cache: {n_identical} of "
        f"{len(outcome.turns)} turns ({summary['comparison']})",
        f"first tokens' logits: differ by at most {summary['largest_logits_difference']:.1e}; the "
        f"closest decision was won by {summary['smallest_logits_margin']:.1e}",
        f"processes {', '.join(str(pid) for pid in summary['pids'])}; "
        f"{summary['elapsed_s']:.0f} s in all",
    ]


def _empty_table() -> Table:
    """As wide as 80 characters at most."""
    table = Table(
        title="prefix tokens by tier, and time to first token (TTFT)",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0),
    )
    table.add_column("turn", no_wrap=True)
    table.add_column("process", justify="right")
    table.add_column("prompt", justify="right")
    for tier in TIERS:
        table.add_column(tier, justify="right", style=COLOURS[tier])
    for name in ("TTFT", "no cache", "ratio", "same"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(turn: TurnRecord) -> list[RenderableType]:
    found = [str(turn.cached_tokens[tier] or "–") for tier in TIERS]
    ratio = turn.baseline_ttft_s / turn.ttft_s if turn.ttft_s > 0 else 0.0
    return [
        f"{turn.turn} {turn.label}",
        str(turn.pid),
        str(turn.prompt_tokens),
        *found,
        f"{turn.ttft_s:.2f} s",
        f"{turn.baseline_ttft_s:.2f} s",
        f"{ratio:.1f}×",
        Text("yes", "green") if turn.identical else Text("NO", "bold red"),
    ]
