"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.wheels import Installed

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.full
def test_the_library_example_computes_once_and_loads_in_a_second_process(
    installed: Installed, tmp_path: Path
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    first, second = (installed.run("python", "-c", code, cwd=tmp_path) for _ in range(2))
    assert "storage=0" in first
    assert re.search(r"storage=[1-9]\d\d", second)
    assert first.partition("CachedTokens")[0] == second.partition("CachedTokens")[0]


def test_the_commands_it_names_exist() -> None:
    commands = set(re.findall(r"^hicache (\S+)", README.read_text(), re.MULTILINE))
    assert commands
    for command in commands:
        result = subprocess.run(
            [str(Path(sys.executable).with_name("hicache")), command, "--help"],
            capture_output=True,
            check=False,
        )
        assert result.returncode == 0, command
