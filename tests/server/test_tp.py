"""A server on several ranks: its processes start, end and die together."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from hicache_core.config.settings import HiCacheConfig
from hicache_core.errors import ConfigError
from hicache_core.server.rank_processes import RankProcesses, device_of
from hicache_core.server.settings import ServerSettings
from tests.server.process import PATIENCE_S, ServerProcess, environment, server_process

FLAGS = ["--tp", "2", "--page-size", "16", "--max-total-tokens", "1024"]
STORAGE = [
    *["--enable-hierarchical-cache", "--hicache-storage-backend", "memory"],
    *["--hicache-storage-prefetch-policy", "wait_complete"],
    *["--hicache-storage-backend-extra-config", '{"prefetch_threshold": 16}'],
]


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[ServerProcess]:
    """A server with storage; the last test that uses it ends it."""
    with server_process(tiny_folder, [*FLAGS, *STORAGE]) as started:
        yield started


def worker_of(server: ServerProcess) -> psutil.Process:
    """The process of rank 1."""
    (line,) = [line for line in server.lines if "rank 1 of 2 is process" in line]
    return psutil.Process(int(line.split()[-1]))


def prefilled(server: ServerProcess) -> dict[str, int]:
    """What the caches had of a prompt, once it is stored."""
    body = {"input_ids": list(range(3, 40)), "sampling_params": {"max_new_tokens": 2}}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=PATIENCE_S)
    flush = {"timeout": PATIENCE_S}
    httpx.post(f"{server.url}/flush_cache", params=flush, timeout=PATIENCE_S).raise_for_status()
    cached: dict[str, int] = answer.raise_for_status().json()["meta_info"]["cached_tokens_details"]
    return cached


def test_storage_is_cleared_on_all_ranks_comes_and_goes(
    server: ServerProcess, tmp_path: Path
) -> None:
    nothing, stored = ({"device": 0, "host": 0, "storage": n} for n in (0, 32))
    backend = f"{server.url}/hicache/storage-backend"
    assert [prefilled(server), prefilled(server)] == [nothing, stored]
    cleared = httpx.post(f"{backend}/clear", timeout=PATIENCE_S).raise_for_status()
    assert f"cleared: {2 * (2 + 1)} objects" in cleared.text  # pages and manifest, by rank
    assert [prefilled(server), prefilled(server)] == [nothing, stored]
    httpx.delete(backend, timeout=PATIENCE_S).raise_for_status()
    assert prefilled(server) == nothing
    assert httpx.post(f"{backend}/clear", timeout=PATIENCE_S).status_code == 400
    other = {
        "hicache_storage_backend": "file",
        "hicache_storage_backend_extra_config_json": json.dumps({"path": str(tmp_path)}),
    }
    httpx.put(backend, json=other, timeout=PATIENCE_S).raise_for_status()
    assert [prefilled(server), prefilled(server)] == [nothing, stored]


def test_a_rank_that_dies_ends_the_server_and_says_so(server: ServerProcess) -> None:
    prefilled(server)
    worker_of(server).kill()
    assert server.process.wait(PATIENCE_S) != 0
    said = "\n".join(server.lines)
    assert "the server has ended, since its engine has stopped: RankLost" in said
    assert "rank 1 (process" in said


def test_when_the_server_is_killed_its_other_processes_end(tiny_folder: Path) -> None:
    with server_process(tiny_folder, FLAGS) as server:
        worker = worker_of(server)
        server.process.send_signal(signal.SIGKILL)
        worker.wait(PATIENCE_S)


def test_a_model_that_cannot_be_split_is_refused_in_words(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "hicache_core.launch_server", "--model-path", str(tiny_folder)]
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


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [device_of("cuda", rank) for rank in (1, 2)] == ["cuda:1", "cuda:2"]
    assert device_of("cpu", 1) == "cpu"
    settings = ServerSettings("model", HiCacheConfig(), tp=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"--tp is 2, .* sees 1 "):
        RankProcesses(settings, "cuda")
    RankProcesses(settings, "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    RankProcesses(settings, "cuda")
