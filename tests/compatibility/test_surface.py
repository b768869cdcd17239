"""What users called in the last version has the same name and means the same in this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility.surface import surface

SERVER = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
CALLS_AND_SERIES = """
/generate /v1/completions /v1/chat/completions /v1/models /get_model_info /get_server_info /health
/health_generate /metrics /hicache/status /hicache/explain/ /flush_cache /hicache/storage-backend
/hicache/storage-backend/clear
num_running_reqs num_queue_reqs gen_throughput prompt_tokens_total generation_tokens_total
num_requests_total time_to_first_token_seconds e2e_request_latency_seconds engine_stalled
"""
GONE = {
    # The simulation, which this extra was for, has left the wheel.
    "extra hicache-core[simulation]",
    # Without it and without the argument NAME, which is new, the backend is file as before.
    "option hicache demo --backend",
    # NAME may stand before the prompt; with --backend, or alone, the prompt is the only one.
    "argument hicache why 1",
}
"""What went or changed on purpose."""

KEPT = sorted(Path(__file__).parent.glob("surface-*.json"))


@pytest.fixture(scope="module")
def today() -> dict[str, Any]:
    return surface()


@pytest.mark.parametrize("file", KEPT, ids=lambda path: path.name)
def test_nothing_that_users_call_is_gone_or_changed(file: Path, today: dict[str, Any]) -> None:
    """New names are welcome; a name that was there before stays and means what it meant."""
    before = json.loads(file.read_text())
    assert len(before) > 400
    changed = {name for name, meaning in before.items() if today.get(name) != meaning}
    assert changed - GONE == set()


def test_the_calls_and_series_of_the_server_are_still_there() -> None:
    """``tests/server/test_docs.py`` holds this page to the code."""
    assert [name for name in CALLS_AND_SERIES.split() if name not in SERVER] == []


def test_there_is_a_list_of_the_last_version() -> None:
    assert [path.name for path in KEPT] == ["surface-0.1.0.json"]
