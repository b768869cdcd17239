"""``hicache demo`` as a user runs it: two processes, six turns, every tier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hicache_core.cli.demo import command
from hicache_core.errors import ConfigError, UnknownBackend

TIERS = {"device", "host", "storage"}
SERVED_BY: dict[int, set[str]] = {
    1: set(),
    2: {"device"},
    3: {"host"},
    4: {"storage"},
    5: {"device"},
    6: {"device"},
}
# The process that was restarted has read the window at the end of turn 4 only.
WINDOWED_SERVED_BY = {**SERVED_BY, 6: {"device", "storage"}}


def run(
    folder: Path, *arguments: str, timeout_s: float = 800
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Runs the demo, with its storage below ``folder``; the process and its JSON document."""
    file = folder / "demo.json"
    process = subprocess.run(
        [sys.executable, "-m", "hicache_core.cli.main", "demo", "--json", str(file), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    document = json.loads(file.read_text()) if file.exists() else {}
    return process, document


def check_document(document: dict[str, Any], served_by: Mapping[int, set[str]] = SERVED_BY) -> None:
    """The form that ``--json`` promises, and where each turn's prefix came from."""
    assert set(document) == {"turns", "summary"}
    assert [turn["turn"] for turn in document["turns"]] == list(served_by)
    page_size = document["summary"]["in_force"]["page_size"]
    for turn in document["turns"]:
        assert set(turn) == {
            *("turn", "prompt_tokens", "cached_tokens", "ttft_s", "baseline_ttft_s", "identical")
        }
        assert turn["identical"] is True
        assert turn["ttft_s"] > 0
        assert turn["baseline_ttft_s"] > 0
        cached = turn["cached_tokens"]
        assert set(cached) == TIERS
        assert sum(cached.values()) < turn["prompt_tokens"]
        assert all(n % page_size == 0 for n in cached.values())
        assert {tier for tier in TIERS if cached[tier]} == served_by[turn["turn"]]
    first, last = document["turns"][0], document["turns"][-1]
    # The other user shares the system prompt only: most of the first prompt, and no answer.
    shared = sum(last["cached_tokens"].values())
    assert 0.8 * first["prompt_tokens"] < shared < first["prompt_tokens"]
    assert len(set(document["summary"]["pids"])) == 2
    assert document["summary"]["problems"] == []


def test_every_tier_serves_its_turn_and_the_tokens_are_identical(
    tiny_folder: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "demo.png"
    process, document = run(
        tmp_path,
        *("--model", str(tiny_folder), "--max-new-tokens", "8", "--threads", "1"),
        *("--plot", str(picture)),
    )
    assert process.returncode == 0, process.stderr + process.stdout
    check_document(document)
    assert picture.read_bytes().startswith(b"\x89PNG")
    for pid in document["summary"]["pids"]:
        assert f"process {pid}" in process.stdout
    assert "tokens identical to those computed without a cache: 6 of 6 turns" in process.stdout
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"demo.json", "demo.png"}, "the storage folder is removed at the end"


def test_a_prompt_of_several_windows_reads_only_the_window_where_it_parts(
    tiny_windowed_folder: Path, tmp_path: Path
) -> None:
    """The other user's prompt ends its shared part far before the window that was read."""
    process, document = run(
        tmp_path,
        *("--model", str(tiny_windowed_folder), "--max-new-tokens", "8", "--threads", "1"),
        *("--page-size", "32"),
    )
    assert process.returncode == 0, process.stderr + process.stdout
    check_document(document, WINDOWED_SERVED_BY)
    last = document["turns"][-1]["cached_tokens"]
    assert 0 < last["storage"] <= 256 < last["device"]


def test_a_corrupted_page_fails_loudly(tiny_folder: Path, tmp_path: Path) -> None:
    """The comparison is real: one page of other numbers, and the demo ends with status 1."""
    kept = tmp_path / "kept"
    process, document = run(
        tmp_path,
        *("--model", str(tiny_folder), "--max-new-tokens", "8", "--threads", "1"),
        *("--corrupt", "--keep", str(kept), "--page-size", "32"),
        *("--hicache-io-backend", "direct", "--hicache-mem-layout", "page_first_direct"),
    )
    assert process.returncode == 1
    assert "FAILED: turn 5: the tokens differ" in process.stdout
    assert [turn["identical"] for turn in document["turns"][:4]] == [True] * 4
    assert document["turns"][4]["identical"] is False
    assert document["summary"]["identical"] is False
    assert document["summary"]["in_force"]["mem_layout"] == "page_first_direct"
    assert any(kept.iterdir()), "--keep keeps what was stored"


def test_a_backend_that_forgets_at_a_restart_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    process, document = run(
        tmp_path,
        *("--model", str(tiny_folder), "--max-new-tokens", "4", "--threads", "1"),
        *("--backend", "memory"),
    )
    assert process.returncode == 1
    assert "FAILED: turn 4: expected something from the storage tier" in process.stdout
    assert document["summary"]["identical"] is True
    assert document["summary"]["as_expected"] is False


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")  # converted by then
def test_smollm2_answers_the_same_from_every_tier(tmp_path: Path) -> None:
    """The demo itself, on real weights; only the answers are shorter."""
    process, document = run(tmp_path, "--max-new-tokens", "8")
    assert process.returncode == 0, process.stderr + process.stdout
    check_document(document)
    assert "SmolLM2-135M-Instruct" in document["summary"]["model"]
    assert all(1_200 < turn["prompt_tokens"] < 2_500 for turn in document["turns"])
    assert "caretaker" in document["summary"]["answers"][0]


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("gemma3")  # converted by then
def test_so_does_gemma_with_a_prompt_of_three_windows(tmp_path: Path) -> None:
    process, document = run(
        tmp_path, "--model", "gemma3-270m", "--max-new-tokens", "8", timeout_s=1700
    )
    assert process.returncode == 0, process.stderr + process.stdout
    check_document(document, WINDOWED_SERVED_BY)
    assert 0 < document["turns"][-1]["cached_tokens"]["storage"] <= 512
    assert document["summary"]["model"] == "gemma-3-270m"
    assert all(1_400 < turn["prompt_tokens"] < 2_500 for turn in document["turns"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--backend", "rediss"], UnknownBackend, "no backend named 'rediss' is installed"),
        (["rediss"], UnknownBackend, "no backend named 'rediss' is installed"),
        (["file", "--config", '{"guard": {"retries": -1}}'], ConfigError, "guard.retries"),
        (["--backend-config", "{"], ConfigError, "JSON"),
        (["--backend-config", '{"pth": "/x"}'], ConfigError, "pth"),
        (["--backend", "memory", "--keep", "kept"], ConfigError, "--keep works only with"),
        (["--page-size", "0"], ConfigError, "page_size"),
        (["--hicache-mem-layout", "pages_last"], ConfigError, "hicache_mem_layout"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(
    arguments: list[str], error: type[Exception], message: str
) -> None:
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, error), result.output
    assert message in str(result.exception)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_told_before_a_model_is_loaded(
    option: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(command, [option, str(tmp_path / "missing" / "x")])
    assert result.exit_code == 2
    assert "there is no folder" in result.output


def test_a_process_that_cannot_load_the_model_says_why(tmp_path: Path) -> None:
    process, document = run(tmp_path, "--model", str(tmp_path))
    assert process.returncode == 2
    assert "is not a model folder: it has no config.json" in process.stderr
    assert document == {}


def test_a_process_that_dies_tells_its_last_words(tmp_path: Path) -> None:
    """transformers does not know the model: its own error comes through."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no-such-model"}')
    process, _ = run(tmp_path, "--model", str(tmp_path / "model"))
    assert process.returncode == 2
    assert "no-such-model" in process.stderr
