"""What the real servers of tests and benchmarks have in common: free ports, and a start.

``valkey``, ``weed`` and ``mooncake`` beside this module start one kind of server each. Every server
runs from the moment it is made until ``close``, on loopback ports of its own, and is ended by its
own process id. So several runs of the tests can go on at once.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

START_S = 40.0
"""A server that is not ready after this time does not start."""

_PORTS = range(12_000, 22_000)
_DERIVED = 10_000
_N_CLAIMS = 64
_claims: deque[int] = deque()


def free_port() -> int:
    """A loopback port that nobody uses now, nor the one 10,000 above it.

    Valkey takes the second one for the bus of a cluster, SeaweedFS for gRPC. Both lie below the
    ports that the kernel gives to clients.

    A process of these tests that asks meanwhile gets another one: the port is claimed by a name
    that the kernel gives to one socket only. The last 64 claims of a process hold, by when the
    server listens.
    """
    while True:
        port = random.SystemRandom().choice(_PORTS)
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0hicache-port-{port}")
            for wanted in (port, port + _DERIVED):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", wanted))
        except OSError:
            claim.close()
            continue
        _claims.append(claim.detach())
        if len(_claims) > _N_CLAIMS:
            os.close(_claims.popleft())
        return port


def n_claims() -> int:
    """How many descriptors of this process are claims of ports, and so no leak."""
    return len(_claims)


def launch(
    command: Sequence[str | Path], log: Path, is_ready: Callable[[], bool], cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Starts a server and returns when it is ready.

    Args:
        command: program and arguments.
        log: file that its output is added to.
        is_ready: asks the server, in bounded time.
        cwd: directory in which it runs.

    Raises:
        RuntimeError: it ended, or is not ready after ``START_S``; with the end of its log.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=cwd)
    try:
        until = time.monotonic() + START_S
        while not is_ready():
            if process.poll() is not None or time.monotonic() > until:
                said = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{command[0]} does not start; it said: {said}")
            time.sleep(0.01)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


def certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, made by openssl in ``directory``."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        "-keyout", str(key), "-out", str(cert), "-subj", "/CN=localhost",
        "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    key.chmod(0o600)
    return cert, key


class JsonProcess:
    """A Python module in a process of its own; commands and answers are lines of JSON.

    The module gets its configuration as one argument, and says ``"ready"`` first.
    """

    def __init__(self, module: str, config: dict[str, Any], stderr: int | None = None) -> None:
        """Starts it and returns when it is ready.

        Args:
            module: is found on the path of this process.
            config: the module's own.
            stderr: as for ``subprocess.Popen``.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert self.answer() == "ready"

    def send_json(self, command: Any) -> None:
        """Sends one command, and does not wait for its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The result of the command that was sent last."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the second process ended"
        return json.loads(line)

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def kill(self) -> None:
        """Ends it without warning."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
