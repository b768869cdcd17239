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
        _wait(process, f"http://127.0.0.1:{metrics}/health", rpc)
        yield f"127.0.0.1:{rpc}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def memory_lender(address: str, nbytes: int) -> Iterator[None]:
    """A process of its own that lends memory, so that what is stored outlives the servers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.mooncake_lender", address, str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "no process lends memory to Mooncake"
        yield
    finally:
        process.kill()
        process.communicate()


def _wait(process: subprocess.Popen[bytes], url: str, rpc_port: int) -> None:
    until = time.monotonic() + 30
    while True:
        assert process.poll() is None, "mooncake_master ended"
        assert time.monotonic() < until, "mooncake_master is not ready"
        with contextlib.suppress(httpx.HTTPError, OSError):
            ready = httpx.get(url, timeout=2).json().get("service_ready")
            with socket.create_connection(("127.0.0.1", rpc_port), timeout=2):
                if ready:
                    return
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
