"""Control over the server of a backend: kill, freeze, restart."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class StoreControl(Protocol):
    """Controls the server of the backend under test; a plugin's tests implement it.

    Each call returns when it has taken effect. The kit restores the server after every rule.
    """

    def kill(self) -> None:
        """Ends the server at once, as SIGKILL does; its clients' connections break."""
        ...

    def restart(self) -> None:
        """Starts a killed server at its old address; returns when it takes connections.

        Its objects may be gone.
        """
        ...

    def freeze(self) -> None:
        """Stops the server without ending it, as SIGSTOP does: connections stay, answers do not."""
        ...

    def thaw(self) -> None:
        """Continues a frozen server."""
        ...


def freeze_process(pid: int) -> None:
    """Sends SIGSTOP and returns when every thread of the process has stopped.

    The signal alone returns at once, and a server may answer one more question meanwhile.
    """
    os.kill(pid, signal.SIGSTOP)
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            while stat.read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.001)


class ServerProcess:
    """A ``StoreControl`` over servers that are child processes."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        """Starts the server.

        Args:
            start: starts it and returns when it takes connections, always at the same address.
        """
        self._start = start
        self._process = start()

    def kill(self) -> None:
        # docstring inherited
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        # docstring inherited
        self._process = self._start()

    def freeze(self) -> None:
        # docstring inherited
        freeze_process(self._process.pid)

    def thaw(self) -> None:
        # docstring inherited
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends the server for good; a second call does nothing."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.kill()
