"""What the demo shows: the table, the plain lines, the picture."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from hicache_core.demo.plot import draw, main_tier
from hicache_core.demo.records import Facts, Note, Outcome, Step
from hicache_core.demo.table import Board, print_outcome, shown

from .test_records import SETTINGS, record

FACTS = Facts(41, "a-model", "float32", {"page_size": 64})


def terminal(*, interactive: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=interactive, width=80, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    console, board = terminal(interactive=True), Board()
    board.add(Step("turn 2: with the cache"))
    board.add(Note("device tier emptied"))
    board.add(record(pid=4194304, prompt_tokens=1999, ttft_s=10.25, label="device emptied"))
    console.print(board)
    lines = text_of(console).splitlines()
    [row] = [line for line in lines if "device emptied" in line]
    for cell in ("4194304", "1999", "64", "10.25 s", "4.00 s", "0.4×", "yes"):
        assert cell in row
    assert any("step 1 of 16" in line for line in lines)
    assert any("device tier emptied" in line for line in lines)


def test_without_a_terminal_each_event_is_one_line() -> None:
    console = terminal(interactive=False)
    with shown(console) as on_event:
        on_event(Step("loading"))
        on_event(FACTS)
        on_event(record(identical=False))
    first, second, third = text_of(console).splitlines()
    assert (first, second) == ("loading", "process 41: a-model, float32")
    assert third.startswith("turn 2 (same conversation) done: process 41, prompt 100, found device")
    assert third.endswith("DIFFERENT")


def test_on_a_terminal_the_live_table_gives_way_to_the_final_one() -> None:
    console = terminal(interactive=True)
    outcome = Outcome(SETTINGS, [record()], [FACTS])
    with shown(console) as on_event:
        on_event(record())
    print_outcome(console, outcome)
    assert "same conversation" in text_of(console)


def test_problems_are_printed_as_failures() -> None:
    console = terminal(interactive=False)
    print_outcome(console, Outcome(SETTINGS, [record(identical=False)], [FACTS]))
    assert "FAILED: turn 2: the tokens differ" in text_of(console)
    assert "0 of 1 turns" in text_of(console)


def test_markup_in_an_answer_is_printed_as_it_is() -> None:
    console = terminal(interactive=False)
    print_outcome(console, Outcome(SETTINGS, [record(answer="[red]no[/red] [/x]")], [FACTS]))
    assert "[red]no[/red] [/x]" in text_of(console)


def test_a_bar_has_the_colour_of_the_tier_that_gave_most() -> None:
    assert main_tier(record(cached_tokens={"device": 64, "host": 128, "storage": 0})) == "host"
    assert main_tier(record(cached_tokens={"device": 0, "host": 0, "storage": 0})) == ""


def test_the_picture_is_written_in_the_format_of_its_suffix(tmp_path: Path) -> None:
    outcome = Outcome(SETTINGS, [record(), record(turn=3)], [FACTS])
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        file = tmp_path / f"demo{suffix}"
        draw(outcome, file)
        assert file.read_bytes().startswith(start)
