"""``hicache demo`` on every plugin of this repository, each on its real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_demo import check_document, run
from tests.servers.mooncake import running_mooncake
from tests.servers.valkey import running
from tests.servers.weed import Weed, settings


@contextmanager
def redis_server(_: Path) -> Iterator[dict[str, Any]]:
    with running() as server:
        yield {"url": server.url}


@contextmanager
def s3_server(directory: Path) -> Iterator[dict[str, Any]]:
    with closing(Weed(directory / "weed")) as weed:
        yield settings(weed.url, read_timeout_s=10.0)


@contextmanager
def mooncake_store(directory: Path) -> Iterator[dict[str, Any]]:
    """A master, and a process that lends memory: the demo's own processes come and go."""
    with running_mooncake(directory, 256 * 2**20) as master:
        yield {"master_server_address": master.address, "global_segment_size": 0}


@contextmanager
def posix_mount(directory: Path) -> Iterator[dict[str, Any]]:
    """A directory stands for the mount: HF3FS in its POSIX mode."""
    yield {"file_path_prefix": str(directory / "hf3fs"), "file_size": 64 * 2**20, "mode": "posix"}


@pytest.mark.parametrize(
    ("backend", "store"),
    [
        ("redis", redis_server),
        pytest.param("s3", s3_server, marks=pytest.mark.full),
        pytest.param("mooncake", mooncake_store, marks=pytest.mark.full),
        pytest.param("hf3fs", posix_mount, marks=pytest.mark.full),
    ],
)
def test_the_demo_runs_on_the_plugin(
    tiny_folder: Path, tmp_path: Path, backend: str, store: Any
) -> None:
    """A restarted process is served from the store; every answer is the same as without cache."""
    with store(tmp_path) as config:
        process, document = run(
            tmp_path,
            *("--model", str(tiny_folder), "--max-new-tokens", "4", "--threads", "1"),
            *("--backend", backend, "--backend-config", json.dumps(config)),
        )
    assert process.returncode == 0, process.stderr + process.stdout
    check_document(document)
