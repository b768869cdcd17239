"""What the documents show runs as printed, from wheels, with nothing of the repository on a path.

A document's Python blocks are one script; its shell blocks are run in order. A server in the
foreground goes on in the background, as in a terminal of its own. Only ports are replaced, by free
ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.end_to_end.wheels import ROOT, Installed
from tests.servers.process import free_port

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.slow

FRAGMENTS = {
    "docs/conformance.md": "a class of somebody's tests",
    "docs/ranks.md": "the names of an engine",
    "docs/write-a-backend.md": "files of a project, which tests/conformance/test_docs.py builds",
}
"""Documents whose Python blocks cannot run by themselves, and what they are."""

SCRIPTS = [
    str(page.relative_to(ROOT))
    for page in sorted((ROOT / "docs").glob("*.md"))
    if "```python\n" in page.read_text() and str(page.relative_to(ROOT)) not in FRAGMENTS
]


def blocks(page: str, *languages: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall((ROOT / page).read_text()) if kind in languages]


@pytest.mark.parametrize("page", SCRIPTS)
def test_the_python_blocks_of_a_page_run(installed: Installed, tmp_path: Path, page: str) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    installed.run("python", script, cwd=tmp_path)


class Terminal:
    """A shell that runs blocks of a page, and ends what they left running."""

    def __init__(self, installed: Installed, folder: Path, ports: Mapping[str, int]) -> None:
        self._installed = installed
        self._folder = folder
        self._ports = ports
        self._under_way: list[subprocess.Popen[str]] = []

    def _bash(self, block: str) -> subprocess.Popen[str]:
        for printed, port in self._ports.items():
            block = block.replace(printed, str(port))
        return subprocess.Popen(
            ["bash", "-euc", block],
            cwd=self._folder,
            env=self._installed.environ(self._folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, block: str, timeout_s: float = 120.0) -> str:
        """Runs a block to its end; what it printed."""
        shell = self._bash(block)
        try:
            told, _ = shell.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)
            raise
        assert shell.returncode == 0, told
        return told

    def start(self, block: str, ready: str) -> None:
        """Runs a block until it prints ``ready``, and lets it go on."""
        shell = self._bash(block)
        self._under_way.append(shell)
        told = ""
        assert shell.stdout is not None
        for line in shell.stdout:
            told += line
            if ready in line:
                return
        raise AssertionError(told)

    def close(self) -> None:
        """Ends what was started."""
        for shell in self._under_way:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                shell.communicate(timeout=30)
                continue
            os.killpg(shell.pid, signal.SIGKILL)
            shell.communicate()


@pytest.fixture
def terminal(installed: Installed, tmp_path: Path) -> Iterator[Terminal]:
    ports = {"30000": free_port(), "6379": free_port()}
    made = Terminal(installed, tmp_path, ports)
    yield made
    made.close()


def test_the_first_minutes_with_the_server_show_an_answer_and_a_hit(terminal: Terminal) -> None:
    serve, ask = blocks("docs/server.md", "bash")[:2]
    installs, _, command = serve.rstrip().rpartition("\n")
    terminal.run(installs)
    terminal.start(f"{command} --port 30000", "hicache: serves")
    told = terminal.run(ask)
    first, end = json.JSONDecoder().raw_decode(told)
    second = json.loads(told[end:])
    answers = [answer["choices"][0]["message"]["content"] for answer in (first, second)]
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (first, second)]
    assert "Paris" in answers[0]
    assert "Madrid" in answers[1]
    assert cached[0] == 0
    assert cached[1] in (64, 128)


def test_the_first_minutes_with_redis_end_in_a_healthy_store(terminal: Terminal) -> None:
    """The demo on Redis is in test_demo_on_plugins.py, with a small model."""
    serve, use = blocks("plugins/redis/README.md", "sh")[:2]
    terminal.start(serve, "is up")
    doctor, demo = use.splitlines()
    assert "round trip" in terminal.run(doctor)
    assert demo.startswith("hicache demo redis ")
