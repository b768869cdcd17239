"""docs/stores.md: its commands run in order, and what it prints is what they print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from hicache_core.cli.main import cli
from tests.unit.cli.test_backend_choice import put
from tests.unit.cli.test_cli import in_process

PAGE = Path(__file__).resolve().parents[3] / "docs" / "stores.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_commands_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "kv-store", 1, 2)
    (block,) = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines():
        program, *words = shlex.split(line)
        assert program == "hicache"
        assert in_process(capsys, *words)[0] == 0


def test_the_sizes_are_those_that_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    command, shown = re.findall(r"```\n\$ (.*?)\n(.*?)```", TEXT, re.DOTALL)[0]
    assert in_process(capsys, *shlex.split(command)[1:])[1] == shown


def test_each_command_of_the_table_exists() -> None:
    named = set(re.findall(r"^\| `hicache ([\w-]+)", TEXT, re.MULTILINE))
    assert {"ls", "du", "usage", "get", "rm", "clear", "pin", "size"} <= named
    assert named <= set(cli.list_commands(click.Context(cli)))
