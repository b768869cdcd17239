"""One stored object for the full pages and the windows of a page, or one for each; file backend."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Row, measure
from hicache_core.plugin import manager
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.types import BackendContext, Page

PAGE_SIZE = 64
WINDOW = 512
N_PAGES = 64
FULL_NBYTES = PAGE_SIZE * 3 * 2 * 256 * 4
WINDOW_NBYTES = PAGE_SIZE * 15 * 2 * 256 * 4
"""Gemma 3 270M in float32: 3 layers with full attention, 15 with windows, a KV head of 256."""


def rows(quick: bool) -> Iterator[Row]:
    """Milliseconds to read a prefix of 4,096 tokens, sealed."""
    repeat = 5 if quick else 15
    n_window = WINDOW // PAGE_SIZE
    table = f"Objects of a page with windows of {WINDOW} tokens: a prefix of {N_PAGES} pages"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        one, two = _Store(Path(folder) / "one"), _Store(Path(folder) / "two")
        joined = _pages(N_PAGES, FULL_NBYTES + WINDOW_NBYTES)
        full, windows = _pages(N_PAGES, FULL_NBYTES), _pages(N_PAGES, WINDOW_NBYTES)
        one.set("a", joined)
        two.set("a", full)
        two.set("b", windows)

        def read_all() -> None:
            two.get("a", full)
            two.get("b", windows)

        def read_last() -> None:
            two.get("a", full)
            two.get("b", windows[-n_window:], N_PAGES - n_window)

        baseline = "read, one object"
        calls: dict[str, Callable[[], None]] = {
            baseline: lambda: one.get("a", joined),
            "read, an object for each group, all of them": read_all,
            "read, an object for each group, windows of the last tokens": read_last,
        }
        for name, call in calls.items():
            wall, cpu = measure(call, repeat=repeat)
            yield Row(
                table,
                name,
                "ms",
                [1e3 * sample for sample in wall],
                [1e3 * sample for sample in cpu],
                baseline=baseline,
            )
        one.close()
        two.close()


class _Store:
    """A file backend with seals, in a folder in memory."""

    def __init__(self, path: Path) -> None:
        kind = manager.backend_class("file")
        context = BackendContext("0" * 16, HEADER_NBYTES + FULL_NBYTES + WINDOW_NBYTES)
        settings = manager.backend_settings(kind, {"path": str(path)})
        self._backend = SealedBackend(kind(settings, context))
        self._backend.open()

    def set(self, group: str, pages: Sequence[Page]) -> None:
        assert self._backend.batch_set(_keys(group, 0, len(pages)), pages) == len(pages)

    def get(self, group: str, pages: Sequence[Page], first: int = 0) -> None:
        assert self._backend.batch_get(_keys(group, first, len(pages)), pages) == len(pages)

    def close(self) -> None:
        self._backend.close()


def _keys(group: str, first: int, n_pages: int) -> list[str]:
    return [f"{group * 16}/{page:064x}" for page in range(first, first + n_pages)]


def _pages(n_pages: int, nbytes: int) -> list[Page]:
    return [
        (memoryview(bytearray(HEADER_NBYTES)), memoryview(bytearray(nbytes)))
        for _ in range(n_pages)
    ]
