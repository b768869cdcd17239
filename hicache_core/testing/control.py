"""Power over the server under a backend: killed, frozen, restarted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Protocol


class StoreControl(Protocol):
    """What the kit asks of whoever runs the server that the backend under test talks to.

    Each call returns when its effect is there. The kit restores the server after every rule.
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
        """Lets a frozen server go on."""
        ...


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
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        # docstring inherited
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends the server for good; a second call does nothing."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.kill()
