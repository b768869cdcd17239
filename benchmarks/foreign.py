"""What the store for engines costs over a backend with seal and guard: 128 pages of 1 MiB.

Rows that are compared take turns. The backend is the file backend on a memory file system, so that
the disk is not measured; then one that answers at once, so that only the own work of the store is.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.guard import Instant, in_turn
from benchmarks.harness import Row
from hicache_core.build.storage import Composed
from hicache_core.integrations.foreign.opening import store_on
from hicache_core.integrations.foreign.store import Answer, ForeignStore
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.config import FileConfig
from hicache_core.storage.file.records import capacity_for
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.types import BackendContext, Page

N_PAGES = 128
NBYTES = 1 << 20
CONTEXT = BackendContext(namespace="0" * 16)


class Says(BackendWrapper):
    """A backend that says whether it bounds its calls, and is asked for each page at once."""

    def __init__(self, inner: StorageBackend, *, bounds: bool) -> None:
        super().__init__(inner)
        self._bounds = bounds

    def bounds_calls(self) -> bool:
        return self._bounds

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        return self.inner.exists_each(keys)

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self.inner.get_each(keys, pages)

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self.inner.set_each(keys, pages)


class Answers(Instant):
    """Answers yes for each page at once; the pages of a read stay as they are."""

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        return [True] * len(keys)

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:  # noqa: ARG002
        return [True] * len(keys)

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:  # noqa: ARG002
        return [True] * len(keys)


def rows(quick: bool) -> Iterator[Row]:
    """Reads and writes on the file backend, and the store's own work."""
    repeat = 7 if quick else 25
    yield from _file_rows(repeat)
    yield from _own_rows(repeat)


def _keys(first: int = 0) -> list[str]:
    return [f"{0:016x}/{first + n:064x}" for n in range(N_PAGES)]


def _store(made: Composed, *, bounds: bool) -> ForeignStore:
    outer = Says(made.backend, bounds=bounds)
    return store_on(Composed(outer, made.guards, made.seals, made.deadlines))


def _composed(backend: StorageBackend) -> Composed:
    seal = SealedBackend(backend)
    config = GuardConfig()
    guard = GuardedBackend(seal, config)
    return Composed(guard, (guard,), (seal,), config.deadlines)


def _checked(answer: Answer) -> None:
    if not all(answer.mask):
        raise RuntimeError(f"{sum(answer.mask)} of {len(answer.mask)} pages: {answer.error}")


def _called_back(submit: Callable[[Callable[[Answer], None]], None]) -> None:
    done = threading.Event()
    answers: list[Answer] = []

    def on_done(answer: Answer) -> None:
        answers.append(answer)
        done.set()

    submit(on_done)
    done.wait()
    _checked(answers[0])


def _file_rows(repeat: int) -> Iterator[Row]:
    memory_files = Path("/dev/shm")
    directory = tempfile.mkdtemp(
        prefix="hicache-bench-", dir=memory_files if memory_files.is_dir() else None
    )
    cap = 2 * (N_PAGES + 1) * capacity_for(HEADER_NBYTES + NBYTES)
    made = _composed(FileBackend(FileConfig(path=Path(directory), max_nbytes=cap), CONTEXT))
    direct, staged = _store(made, bounds=True), _store(made, bounds=False)
    memory = memoryview(bytearray(N_PAGES * NBYTES))
    pages: list[Page] = [(memory[n * NBYTES : (n + 1) * NBYTES],) for n in range(N_PAGES)]
    headers = [memoryview(bytearray(HEADER_NBYTES)) for _ in range(N_PAGES)]
    with_headers: list[Page] = [(h, *page) for h, page in zip(headers, pages, strict=True)]
    keys = _keys()
    gone = _keys(N_PAGES)
    try:
        _checked(direct.write(keys, pages))
        reads: dict[str, Callable[[], object]] = {
            "guard and seal": lambda: made.backend.get_each(keys, with_headers),
            "direct": lambda: _checked(direct.read(keys, pages)),
            "direct, called back": lambda: _called_back(
                lambda done: direct.submit_read(keys, pages, done)
            ),
            "staged": lambda: _checked(staged.read(keys, pages)),
        }
        writes: dict[str, Callable[[], object]] = {
            "guard and seal": lambda: made.backend.set_each(gone, with_headers),
            "direct": lambda: _checked(direct.write(gone, pages)),
            "staged": lambda: _checked(staged.write(gone, pages)),
        }
        again: dict[str, Callable[[], object]] = {
            "guard and seal": lambda: made.backend.set_each(keys, with_headers),
            "direct": lambda: _checked(direct.write(keys, pages)),
            "staged": lambda: _checked(staged.write(keys, pages)),
        }
        for what, calls, setup in (
            ("read", reads, None),
            ("write", writes, lambda: made.backend.delete(gone)),
            ("write what is stored", again, None),
        ):
            samples = in_turn(calls, repeat, 1, setup)
            for name, (wall, cpu) in samples.items():
                yield Row(
                    f"foreign: file backend, {what}, 1 MiB × {N_PAGES}",
                    name,
                    "ms",
                    [s * 1e3 for s in wall],
                    [s * 1e3 for s in cpu],
                    None if name == "guard and seal" else "guard and seal",
                    "< 3 % over guard and seal" if name == "direct" and what == "read" else None,
                )
    finally:
        for store in (staged, direct):
            store.close()
        shutil.rmtree(directory)


def _own_rows(repeat: int) -> Iterator[Row]:
    """The store over a backend that answers at once: headers, masks, counts, threads."""
    config = GuardConfig()
    backend = Answers()
    made = Composed(backend, (), (), config.deadlines)
    direct, staged = _store(made, bounds=True), _store(made, bounds=False)
    pages: list[Page] = [(memoryview(bytearray(64)),) for _ in range(N_PAGES)]
    keys = _keys()
    calls: dict[str, Callable[[], object]] = {
        "read, direct": lambda: direct.read(keys, pages),
        "read, direct, called back": lambda: _called_back(
            lambda done: direct.submit_read(keys, pages, done)
        ),
        "read, staged": lambda: staged.read(keys, pages),
        "write, direct": lambda: direct.write(keys, pages),
        "exists, direct": lambda: direct.exists(keys),
        "exists, staged": lambda: staged.exists(keys),
    }
    table = f"foreign: one call of {N_PAGES} pages, answered at once"
    for name, (wall, cpu) in in_turn(calls, repeat, 200).items():
        yield Row(table, name, "us a call", [s * 1e6 for s in wall], [s * 1e6 for s in cpu])
    for store in (staged, direct):
        store.close()
