"""Pages and second processes for the tests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hicache_hf3fs import Hf3fsBackend, Hf3fsConfig

from hicache_core.types import BackendContext, Page
from tests.servers.process import JsonProcess

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


class Peer(JsonProcess):
    """A second process with a backend of its own on the same store."""

    def __init__(self, prefix: Path, **settings: Any) -> None:
        super().__init__("plugins.hf3fs.tests.peer", {"prefix": str(prefix), **settings})

    def ask(self, command: str, *arguments: Any) -> Any:
        """Has one function of ``peer.py`` called; its result."""
        self.begin(command, *arguments)
        return self.answer()

    def begin(self, command: str, *arguments: Any) -> None:
        """Has one function of ``peer.py`` called, and does not wait for its result."""
        self.send_json([command, *arguments])
