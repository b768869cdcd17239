"""Pages and second processes for the tests."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hicache_hf3fs import Hf3fsBackend, Hf3fsConfig

from hicache_core.types import BackendContext, Page

NAMESPACE = "0123456789abcdef"
EMULATION = Path(__file__).with_name("emulation")


def key_of(label: object) -> str:
    """A page key."""
    return f"{NAMESPACE}/{hashlib.sha256(str(label).encode()).hexdigest()}"


def content(key: str, nbytes: int) -> bytes:
    """The object of a key: no two keys have the same."""
    return hashlib.shake_128(key.encode()).digest(nbytes)


def page_of(key: str, shape: Sequence[int]) -> Page:
    """A page with segments of these lengths that holds the object of ``key``."""
    data = memoryview(bytearray(content(key, sum(shape))))
    page, at = [], 0
    for nbytes in shape:
        page.append(data[at : at + nbytes])
        at += nbytes
    return page


def blank(shape: Sequence[int]) -> Page:
    """A page that holds nothing yet."""
    return [memoryview(bytearray(nbytes)) for nbytes in shape]


def bytes_of(page: Page) -> bytes:
    """The object in a page."""
    return b"".join(page)


def put(backend: Hf3fsBackend, labels: Sequence[object], nbytes: int = 1000) -> int:
    """Stores the objects of these labels in one batch; the count."""
    keys = [key_of(label) for label in labels]
    return backend.batch_set(keys, [page_of(key, (64, nbytes - 64)) for key in keys])


def hits(backend: Hf3fsBackend, labels: Sequence[object], nbytes: int = 1000) -> int:
    """How many leading objects ``batch_get`` gives; wrong bytes fail the test."""
    keys = [key_of(label) for label in labels]
    pages = [blank((64, nbytes - 64)) for _ in keys]
    n = backend.batch_get(keys, pages)
    for key, page in zip(keys[:n], pages, strict=False):
        assert bytes_of(page) == content(key, nbytes), f"wrong bytes under {key}"
    return n


def new_backend(prefix: Path, *, rank: int = 0, **settings: Any) -> Hf3fsBackend:
    """A small backend, not open yet: slots of 4 KiB, 64 of them unless said otherwise."""
    values = {"file_path_prefix": prefix, "file_size": 64 * 4096, "slot_nbytes": 3000, **settings}
    return Hf3fsBackend(Hf3fsConfig.model_validate(values), BackendContext(NAMESPACE, 0, rank))


class Peer:
    """A second process with a backend of its own on the same store."""

    def __init__(self, prefix: Path, **settings: Any) -> None:
        arguments = json.dumps({"prefix": str(prefix), **settings})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "plugins.hf3fs.tests.peer", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert self._answer() == "ready"

    def ask(self, command: str, *arguments: Any) -> Any:
        """Has one function of ``peer.py`` called; its result."""
        self.begin(command, *arguments)
        return self._answer()

    def begin(self, command: str, *arguments: Any) -> None:
        """Has one function of ``peer.py`` called, and does not wait for its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """Ends it without warning."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the second process ended"
        return json.loads(line)
