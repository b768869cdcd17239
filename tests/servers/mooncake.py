"""Mooncake as child processes: a ``mooncake_master``, and clients that lend it memory."""

from __future__ import annotations

import json
import os
import shutil
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
from hicache_core.testing.control import ServerProcess
from tests.servers.process import START_S, JsonProcess, free_port, launch


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


class Master(ServerProcess):
    """A ``mooncake_master``; satisfies the kit's ``StoreControl``.

    Attributes:
        address: host and port of its RPC.
        rpc_port: that port.
        metrics_port: its HTTP port.
    """

    def __init__(self, directory: Path, lease_ms: int = 5000, flags: Sequence[str] = ()) -> None:
        """Starts it and returns when it serves.

        Args:
            directory: where its log is written.
            lease_ms: how long an object that was read is not evicted.
            flags: further ones; they go before ours.
        """
        self.rpc_port = free_port()
        self.metrics_port = free_port()
        self.address = f"127.0.0.1:{self.rpc_port}"
        self._log = directory / f"master-{self.rpc_port}.log"
        self._command = [
            master_binary(),
            "--rpc_address=127.0.0.1",
            f"--rpc_port={self.rpc_port}",
            "--metrics_host=127.0.0.1",
            f"--metrics_port={self.metrics_port}",
            "--rpc_thread_num=2",
            f"--default_kv_lease_ttl={lease_ms}",
            "--put_start_discard_timeout_sec=2",  # keys of a killed writer come back
            "--logtostderr",
            *flags,
        ]
        super().__init__(lambda: launch(self._command, self._log, self._serves))

    def wait_for_memory(self) -> None:
        """Returns when some process lends memory; after a restart they join again by themselves."""
        url = f"http://127.0.0.1:{self.metrics_port}/get_all_segments"
        deadline = time.monotonic() + START_S
        while True:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.read().strip():
                    return
            assert time.monotonic() < deadline, "no process lends memory to the master"
            time.sleep(0.05)

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


class Peer(JsonProcess):
    """A second process with its own client; it lends memory and works on command."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__("tests.servers.mooncake_peer", config, subprocess.DEVNULL)

    def ask(self, **command: Any) -> Any:
        """Sends one command and waits for its result."""
        self.send(**command)
        return self.answer()

    def send(self, **command: Any) -> None:
        """Sends one command."""
        self.send_json(command)

    def stop(self) -> None:
        """Lets it take its memory back from the store and end; a second call does nothing."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(20)
        self.kill()


@contextmanager
def running_mooncake(
    directory: Path, lent_nbytes: int = 0, flags: Sequence[str] = ()
) -> Iterator[Master]:
    """A master, and unless ``lent_nbytes`` is 0 a process that lends it so much memory."""
    master = Master(directory, flags=flags)
    peer = None
    try:
        if lent_nbytes:
            config = {"master_server_address": master.address, "global_segment_size": lent_nbytes}
            peer = Peer(config)
        yield master
    finally:
        if peer is not None:
            peer.stop()
        master.close()
