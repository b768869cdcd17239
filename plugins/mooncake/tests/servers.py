"""Real Mooncake servers for tests and benchmarks: on free ports, ended by their own process id."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hicache_mooncake.client import load_library

from hicache_core.errors import BrokenBackend
from hicache_core.testing.control import freeze_process


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def master_binary() -> str:
    """Path of ``mooncake_master``; without it the test is skipped, or fails in CI."""
    binary = shutil.which("mooncake_master", path=str(Path(sys.executable).parent))
    try:
        load_library()
    except BrokenBackend as error:
        reason = str(error)
    else:
        if binary:
            return binary
        reason = f"no mooncake_master beside {sys.executable}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Master:
    """A ``mooncake_master`` process, stopped by its own id."""

    def __init__(self, directory: Path, lease_ms: int = 5000, flags: Sequence[str] = ()) -> None:
        self.rpc_port = free_port()
        self.metrics_port = free_port()
        self.address = f"127.0.0.1:{self.rpc_port}"
        self.lease_ms = lease_ms
        self.flags = flags
        self._log = directory / f"master-{self.rpc_port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and returns when it serves."""
        binary = master_binary()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    binary,
                    "--rpc_address=127.0.0.1",
                    f"--rpc_port={self.rpc_port}",
                    "--metrics_host=127.0.0.1",
                    f"--metrics_port={self.metrics_port}",
                    "--rpc_thread_num=2",
                    f"--default_kv_lease_ttl={self.lease_ms}",
                    "--put_start_discard_timeout_sec=2",  # keys of a killed writer come back
                    "--logtostderr",
                    *self.flags,
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 20
        while not self._serves():
            assert self._process.poll() is None, f"mooncake_master ended; see {self._log}"
            assert time.monotonic() < deadline, f"mooncake_master is not ready; see {self._log}"
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends it without warning."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wait_for_memory(self) -> None:
        """Returns when some process lends memory; after a restart they join again by themselves."""
        url = f"http://127.0.0.1:{self.metrics_port}/get_all_segments"
        deadline = time.monotonic() + 20
        while True:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.read().strip():
                    return
            assert time.monotonic() < deadline, "no process lends memory to the master"
            time.sleep(0.05)

    def freeze(self) -> None:
        """Stops it where it stands; its ports stay open."""
        assert self._process is not None
        freeze_process(self._process.pid)

    def thaw(self) -> None:
        """Lets it go on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def _serves(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.metrics_port}/health", timeout=1
            ) as answer:
                ready = bool(json.load(answer)["service_ready"])
            with socket.create_connection(("127.0.0.1", self.rpc_port), timeout=1):
                return ready
        except (OSError, urllib.error.URLError):
            return False


class Peer:
    """A second process with its own client; it lends memory and works on command."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("peer.py")), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert self.answer() == "ready"

    def ask(self, **command: Any) -> Any:
        """Sends one command and waits for its result."""
        self.send(**command)
        return self.answer()

    def send(self, **command: Any) -> None:
        """Sends one command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Lets it take its memory back from the store and end; a second call does nothing."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(20)
        self.kill()

    def kill(self) -> None:
        """Ends it without warning."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def answer(self) -> Any:
        """The result of the command that was sent last."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the peer process ended"
        return json.loads(line)


@contextmanager
def running_mooncake(directory: Path, lent_nbytes: int = 0) -> Iterator[Master]:
    """A master, and unless ``lent_nbytes`` is 0 a process that lends it so much memory."""
    server = Master(directory)
    server.start()
    peer = None
    try:
        if lent_nbytes:
            config = {"master_server_address": server.address, "global_segment_size": lent_nbytes}
            peer = Peer(config)
        yield server
    finally:
        if peer is not None:
            peer.stop()
        server.kill()
