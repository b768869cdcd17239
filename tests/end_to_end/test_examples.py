"""The notebook of ``examples/`` runs from wheels, and finds what its words say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.end_to_end.wheels import ROOT, Installed


@pytest.mark.full
def test_the_notebook_finds_the_shared_prompt_on_the_device_and_then_in_the_store(
    installed: Installed, tmp_path: Path
) -> None:
    cells = json.loads((ROOT / "examples" / "first_hit.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    printed = installed.run("python", "-c", "\n".join(code), cwd=tmp_path)
    found = re.findall(r"device=(\d+), host=(\d+), storage=(\d+)", printed)
    assert len(found) == 4
    first, second, third, restarted = ([int(n) for n in one] for one in found)
    assert first == [0, 0, 0]
    assert second == third
    assert second[0] > 64
    assert restarted[:2] == [0, 0]
    assert restarted[2] >= second[0]  # the first question itself is there, too
