"""A real ``mooncake_master`` on free ports of loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest


@contextlib.contextmanager
def mooncake_master(directory: Path) -> Iterator[str]:
    """Its address; without the binary the test is skipped, or fails in CI."""
    binary = shutil.which("mooncake_master", path=str(Path(sys.executable).parent))
    if binary is None:
        reason = f"no mooncake_master beside {sys.executable}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    rpc, metrics = _free_port(), _free_port()
    with (directory / "master.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                "--rpc_address=127.0.0.1",
                f"--rpc_port={rpc}",
                "--metrics_host=127.0.0.1",
                f"--metrics_port={metrics}",
                "--rpc_thread_num=2",
                "--default_kv_lease_ttl=5000",
                "--logtostderr",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        _wait(process, f"http://127.0.0.1:{metrics}/health")
        yield f"127.0.0.1:{rpc}"
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + 30
    while True:
        assert process.poll() is None, "mooncake_master ended"
        assert time.monotonic() < until, "mooncake_master is not ready"
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2).json().get("service_ready"):
                return
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
