"""What docs/lifecycle.md shows is what happens."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hicache_core.cli.main import main
from hicache_core.plugin.manager import backend_class
from hicache_core.storage.base import Pins, ReportsUsage
from hicache_core.storage.scrub import KINDS, REMOVED

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs/lifecycle.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_examples_run_and_say_what_they_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,), (shown,), (commands,) = blocks("python"), blocks("text"), blocks("sh")
    command = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == shown
    monkeypatch.chdir(tmp_path)
    told = []
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "hicache"
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == len(told)
        told.append(capsys.readouterr().out)
    assert "unknown" in told[0]
    assert "0 would be removed" in told[0]
    assert '"removed": 1' in told[1]


@pytest.mark.parametrize("name", ["memory", "file"])
def test_the_table_of_backends_is_what_they_can_do(name: str) -> None:
    cls = backend_class(name)
    (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", TEXT, re.MULTILINE)
    ttl, quota, pins, usage, _ = (cell.strip() for cell in row.split("|"))
    assert ttl.strip("`") in cls.Config.model_fields
    assert quota.strip("`") in cls.Config.model_fields
    assert pins.startswith("yes") == issubclass(cls, Pins)
    assert usage.startswith("yes") == issubclass(cls, ReportsUsage)


def test_the_table_of_kinds_is_what_is_removed() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| *(yes|no|with .*|) *\|$", TEXT, re.MULTILINE))
    assert rows.keys() == set(KINDS)
    assert {kind for kind, removed in rows.items() if removed == "yes"} == REMOVED
