"""A second process that uses the same store; it gets keys and sizes, never bytes.

It stores and expects ``content(key, nbytes)``, so only questions and verdicts are sent over the
pipe, one line of JSON each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from hicache_core.testing.bounded import bounded
from hicache_core.testing.recipe import Recipe

CHILD_MODULE = "hicache_core.testing.peer_child"


class PeerFailed(AssertionError):
    """The second process raised, or ended; the message says why."""


class Peer:
    """The second process, with an opened backend."""

    def __init__(self, recipe: Recipe, bound_s: float) -> None:
        """Starts it; its backend opens while the caller goes on.

        Args:
            recipe: makes the backend; the settings go through the pipe, so that no list of
                processes shows a secret.
            bound_s: seconds that each answer may take.
        """
        if not recipe.asked:
            name = recipe.backend_class.__qualname__
            raise PeerFailed(f"another process cannot import {name}; put it at a module's top")
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._bound_s = bound_s
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", CHILD_MODULE],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._send(recipe.to_json())
        self._ready = False

    def put(self, keys: Sequence[str], nbytes: int) -> None:
        """Stores the objects of ``keys``."""
        self._ask("put", keys, nbytes)

    def check(self, keys: Sequence[str], nbytes: int) -> list[str]:
        """Reads each key: ``hit``, ``miss``, or what is wrong with its bytes."""
        answer = self._ask("check", keys, nbytes)
        assert isinstance(answer, list)
        return answer

    def start_writing(self, keys: Sequence[str], nbytes: int) -> None:
        """Stores the objects of ``keys`` one after the other, and returns when it begins."""
        self._ask("begin", keys, nbytes)

    def kill(self) -> None:
        """Kills the process, in the middle of what it does."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ends the process; a second call does nothing."""
        if self._process.poll() is None:
            self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # the child ended with a question unread
                    continue

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _receive(self) -> object:
        assert self._process.stdout is not None
        line = bounded(self._process.stdout.readline, self._bound_s, "the second process")
        if not line:
            raise PeerFailed(f"the second process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"in the second process: {answer['error']}")
        return answer["result"]

    def _ask(self, what: str, keys: Sequence[str], nbytes: int) -> object:
        if not self._ready:
            self._receive()
            self._ready = True
        self._send(json.dumps({"what": what, "keys": list(keys), "nbytes": nbytes}))
        return self._receive()
