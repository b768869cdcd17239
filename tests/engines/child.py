"""Engines and their servers as child processes, each in a process group of its own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

START_S = 240.0
"""An engine that is not ready after this time does not start. Its imports alone take 15 s."""
ANSWER_S = 120.0
"""No command of these tests may take longer."""


class EngineDied(Exception):
    """The process ended; the message has the end of its log."""


class EngineLate(Exception):
    """No answer came in time; the message has the end of the log."""


class Group:
    """A program and all processes that it starts, which are ended together.

    Attributes:
        log: the file with what all of them print.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str],
        log: Path,
        pipe: int = subprocess.DEVNULL,
    ) -> None:
        """Starts it, and returns at once.

        Args:
            command: program and arguments.
            env: its whole environment.
            log: file that its output is added to.
            pipe: for stdin and stdout, as for ``subprocess.Popen``; by default stdout is the log.
        """
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=output if pipe == subprocess.DEVNULL else pipe,
                stderr=output,
                env=env,
                start_new_session=True,
            )

    def wait(self, is_ready: Callable[[], bool]) -> None:
        """Returns when it is ready.

        Args:
            is_ready: asks it, in bounded time.

        Raises:
            EngineDied, EngineLate: it is not.
        """
        until = time.monotonic() + START_S
        while not is_ready():
            if self._process.poll() is not None:
                raise EngineDied(f"the process ended; its log ends: {self.words()}")
            if time.monotonic() > until:
                raise EngineLate(f"not ready after {START_S} s; the log ends: {self.words()}")
            time.sleep(0.05)

    def words(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        """Ends all processes at once, as SIGKILL does; a second call does nothing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Child(Group):
    """A runner; see ``tests/engines/runners/json_lines.py``."""

    def __init__(self, command: Sequence[str | Path], env: Mapping[str, str], log: Path) -> None:
        """Starts it, and returns at once; arguments as for ``Group``."""
        super().__init__(command, env, log, subprocess.PIPE)
        self._rest = b""

    def wait_until_ready(self) -> None:
        """Returns when the engine has started."""
        assert self.answer(START_S) == "ready"

    def ask(self, do: str, within_s: float = ANSWER_S, **named: Any) -> Any:
        """Sends a command and returns its answer."""
        self.send(do, **named)
        return self.answer(within_s)

    def send(self, do: str, **named: Any) -> None:
        """Sends a command, and does not wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **named}).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, within_s: float = ANSWER_S) -> Any:
        """The answer to the command that was sent first among those without one.

        Raises:
            EngineDied, EngineLate: there is none.
        """
        assert self._process.stdout is not None
        until = time.monotonic() + within_s
        while b"\n" not in self._rest:
            left = max(0.0, until - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise EngineLate(f"no answer after {within_s} s; the log ends: {self.words()}")
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            if not read:
                raise EngineDied(f"the engine ended; its log ends: {self.words()}")
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)
