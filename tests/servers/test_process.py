"""The starters themselves: ports are nobody else's, and a server that does not start says why."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.process import free_port, launch

ASK = """
from tests.servers import process
process._PORTS = range({0}, {0} + 3)
print(process.free_port())
"""


def asked(first: int) -> int:
    """What another process is given that has three ports to choose from."""
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(first)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
        timeout=30,
    )
    return int(done.stdout)


def test_another_process_is_not_given_a_port_that_nobody_listens_on_yet() -> None:
    ours = free_port()
    assert asked(ours) in (ours + 1, ours + 2)


def test_a_port_that_is_taken_is_not_given() -> None:
    port = free_port() + 1
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        assert asked(port) in (port + 1, port + 2)


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no room for me'); raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match="no room for me"):
        launch(command, tmp_path / "log", lambda: False)


def test_a_server_is_ended_when_asking_it_fails(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code]
    log = tmp_path / "log"

    def ask() -> bool:
        if not log.read_text():
            return False
        raise KeyError("not what was expected")

    with pytest.raises(KeyError):
        launch(command, log, ask)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
