"""A real server process on a free port of loopback, with a tiny model."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.server.tiny import unlabelled

PATIENCE_S = 90.0
_READY = re.compile(r"serves (\S+) at (http://\S+)")


@dataclass
class ServerProcess:
    """A server that answers.

    Attributes:
        url: where.
        process: the child.
        lines: what it has said, both streams.
    """

    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and its labels, without that of the model."""
        text = httpx.get(f"{self.url}/metrics").raise_for_status().text
        samples = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {unlabelled(name): float(value) for name, value in samples}

    def stop(self) -> int:
        """Ends it as an operator does; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


def environment(**more: str) -> dict[str, str]:
    """Of a child: one thread, no network, no settings of ours."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HICACHE_")}
    path = os.pathsep.join(entry for entry in [os.getcwd(), *sys.path] if entry)
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return {**clean, **own, **more}


@contextlib.contextmanager
def server_process(
    model: Path | str,
    flags: Sequence[str],
    env: dict[str, str] | None = None,
    patience_s: float = PATIENCE_S,
) -> Iterator[ServerProcess]:
    """Starts ``hicache_core.launch_server`` and waits until it answers; kills it at the end.

    It fails if the server is silent for ``patience_s`` before it answers.
    """
    command = [sys.executable, "-m", "hicache_core.launch_server", "--model-path", str(model)]
    process = subprocess.Popen(
        [*command, "--port", "0", *flags],
        env=environment(**(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    news: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, lines, news))
    reader.start()
    try:
        yield ServerProcess(_url(news, lines, patience_s), process, lines)
    finally:
        process.kill()
        process.wait()
        reader.join()


def _read(process: subprocess.Popen[str], lines: list[str], news: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.append(line.rstrip())
            news.put(line)
    news.put(None)


def _url(news: queue.Queue[str | None], lines: list[str], patience_s: float) -> str:
    while True:
        line = news.get(timeout=patience_s)
        assert line is not None, "\n".join(lines)
        if found := _READY.search(line):
            return found[2]
