"""The example of docs/engine.md runs, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "engine.md"


def test_the_example_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    exec(compile(example, str(PAGE), "exec"), {"__name__": "docs"})
    said = re.findall(r"^# (.*)$", example, flags=re.M)
    assert capsys.readouterr().out.splitlines() == said
