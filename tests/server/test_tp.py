"""A server on several ranks: its processes start, end and die together."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.process import PATIENCE_S, ServerProcess, environment, server_process
from tests.unit.engine.tiny_chat_model import save_tiny_chat_model

FLAGS = ["--tp", "2", "--page-size", "16", "--max-total-tokens", "1024"]
STORAGE = ["--enable-hierarchical-cache", "--hicache-storage-backend", "memory"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("model") / "tiny")


def worker_of(server: ServerProcess) -> psutil.Process:
    """The process of rank 1."""
    (line,) = [line for line in server.lines if "rank 1 of 2 is process" in line]
    return psutil.Process(int(line.split()[-1]))


def test_a_rank_that_dies_ends_the_server_and_says_so(folder: Path) -> None:
    with server_process(folder, [*FLAGS, *STORAGE]) as server:
        body = {"input_ids": list(range(3, 40)), "sampling_params": {"max_new_tokens": 2}}
        httpx.post(f"{server.url}/generate", json=body, timeout=PATIENCE_S).raise_for_status()
        cleared = httpx.post(f"{server.url}/hicache/storage-backend/clear")
        assert cleared.status_code == 400
        assert "2 ranks" in cleared.text
        worker_of(server).kill()
        assert server.process.wait(PATIENCE_S) != 0
    said = "\n".join(server.lines)
    assert "the server has ended, since its engine has stopped: RankLost" in said
    assert "rank 1 (process" in said


def test_when_the_server_is_killed_its_other_processes_end(folder: Path) -> None:
    with server_process(folder, FLAGS) as server:
        worker = worker_of(server)
        server.process.send_signal(signal.SIGKILL)
        worker.wait(PATIENCE_S)


def test_a_model_that_cannot_be_split_is_refused_in_words(folder: Path) -> None:
    command = [sys.executable, "-m", "hicache_core.launch_server", "--model-path", str(folder)]
    ended = subprocess.run(
        [*command, "--port", "0", "--tp", "4"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode != 0
    assert "cannot be split over 4 ranks: it has 2 KV heads" in ended.stderr
    assert "possible: --tp 1 or 2" in ended.stderr
