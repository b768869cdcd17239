"""What the guard costs: with the seal over the file backend, and alone; and the worker's poll.

Rows that are compared take turns, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Row, measure
from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.config import FileConfig
from hicache_core.storage.file.records import capacity_for
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.storage.workers.executor import Deadlines
from hicache_core.storage.workers.worker import StorageWorker
from hicache_core.types import BackendContext, Page, ReadJob

CONTEXT = BackendContext(namespace="0" * 16)
BATCH_PAGES = 128
N_IN_FLIGHT = 256


class Instant(StorageBackend):
    """Answers at once, so that only its wrappers are measured."""

    name = "instant"

    def __init__(self) -> None:
        super().__init__(BackendConfig(), CONTEXT)

    def get(self, key: str) -> Buffer | None:  # noqa: ARG002 - the name is the contract's
        return None

    def exists(self, key: str) -> bool:  # noqa: ARG002 - the name is the contract's
        return True

    def set(self, key: str, value: Buffer) -> None:
        """Drops it."""

    def batch_exists(self, keys: Sequence[str]) -> int:
        return len(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:  # noqa: ARG002
        return len(keys)


def _keys(n_pages: int) -> list[str]:
    return [f"{0:016x}/{n:064x}" for n in range(n_pages)]


def _pages(n_pages: int, nbytes: int) -> list[Page]:
    memory = memoryview(bytearray(os.urandom(n_pages * nbytes)))
    headers = [memoryview(bytearray(HEADER_NBYTES)) for _ in range(n_pages)]
    payloads = [memory[n * nbytes : (n + 1) * nbytes] for n in range(n_pages)]
    return list(zip(headers, payloads, strict=True))


def in_turn(
    calls: dict[str, Callable[[], object]],
    repeat: int,
    number: int,
    setup: Callable[[], object] | None = None,
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each call by wall clock and by CPU time; one sample of each, again and again."""
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            wall, cpu = measure(call, repeat=1, number=number, setup=setup)
            samples[name][0].extend(wall)
            samples[name][1].extend(cpu)
    return samples


def _drop_cache(directory: Path) -> None:
    """Puts the records on the disk and out of the page cache."""
    for path in directory.rglob("*"):
        if path.is_file() and path.suffix not in (".sqlite", ".lock"):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def rows(quick: bool) -> Iterator[Row]:
    """Reads of 1 MiB and 64 KiB pages, the guard alone, a poll with jobs in flight."""
    repeat = 7 if quick else 25
    for nbytes, label in ((1 << 20, "1 MiB"), (1 << 16, "64 KiB")):
        yield from _file_rows(nbytes, label, repeat)
    yield from _guard_rows(repeat)
    yield from _poll_rows(repeat)


def _file_rows(nbytes: int, label: str, repeat: int) -> Iterator[Row]:
    """The same objects read through the bare backend, the seal, and guard and seal."""
    directory = Path(tempfile.mkdtemp(prefix="hicache-bench-"))
    cap = (BATCH_PAGES + 1) * capacity_for(HEADER_NBYTES + nbytes)
    bare = FileBackend(FileConfig(path=directory / "store", max_nbytes=cap), CONTEXT)
    sealed = SealedBackend(bare)
    guarded = GuardedBackend(sealed, GuardConfig())
    guarded.open()
    try:
        keys, pages = _keys(BATCH_PAGES), _pages(BATCH_PAGES, nbytes)
        if guarded.batch_set(keys, pages) != BATCH_PAGES:
            raise RuntimeError("the backend dropped pages")

        def read(backend: StorageBackend) -> Callable[[], object]:
            def call() -> None:
                if backend.batch_get(keys, pages) != BATCH_PAGES:
                    raise RuntimeError("the backend lost pages")

            return call

        calls = {
            "bare": read(bare),
            "sealed": read(sealed),
            "guard + sealed": read(guarded),
        }
        number = max(1, (1 << 25) // (nbytes * BATCH_PAGES))
        warm = in_turn(calls, repeat, number)
        cold = in_turn(calls, repeat // 2, 1, lambda: _drop_cache(directory))
    finally:
        guarded.close()
        shutil.rmtree(directory)
    target = "< 5 % over bare" if nbytes == 1 << 20 else "< 20 us over bare"
    for heat, samples in (("warm", warm), ("cold", cold)):
        table = f"guard: file backend, get {heat}, {label} × {BATCH_PAGES}"
        for name, (wall, cpu) in samples.items():
            wall_us, cpu_us = ([s / BATCH_PAGES * 1e6 for s in each] for each in (wall, cpu))
            baseline = None if name == "bare" else "bare"
            aim = target if name == "guard + sealed" else None
            yield Row(table, name, "us a page", wall_us, cpu_us, baseline, aim)


def _guard_rows(repeat: int) -> Iterator[Row]:
    """What one call costs that the backend answers at once."""
    keys, pages = _keys(BATCH_PAGES), _pages(BATCH_PAGES, 64)
    bare = Instant()
    guarded = GuardedBackend(bare, GuardConfig())
    remembering = GuardedBackend(bare, GuardConfig(negative_ttl_s=1e9))
    for name in _keys(BATCH_PAGES + 1)[BATCH_PAGES:]:
        remembering.get(name)
    calls: dict[str, Callable[[], object]] = {
        "bare: batch_get": lambda: bare.batch_get(keys, pages),
        "guard: batch_get": lambda: guarded.batch_get(keys, pages),
        "guard: batch_exists": lambda: guarded.batch_exists(keys),
        "guard: batch_exists, a failed key is known": lambda: remembering.batch_exists(keys),
    }
    table = f"guard: one call of {BATCH_PAGES} pages, answered at once"
    for name, (wall, cpu) in in_turn(calls, repeat, 500).items():
        yield Row(table, name, "us a call", [s * 1e6 for s in wall], [s * 1e6 for s in cpu])


class Closed(Instant):
    """Answers nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:  # noqa: ARG002
        self.gate.wait()
        return len(keys)


def _poll_rows(repeat: int) -> Iterator[Row]:
    """``drain`` while many jobs wait and run, none of them late; and when all are late at once."""
    table = f"storage worker: drain with {N_IN_FLIGHT} jobs in flight"
    offset = [0.0]

    def start() -> tuple[StorageWorker, Closed]:
        backend = Closed()
        worker = StorageWorker(
            backend,
            n_threads=4,
            max_read_nbytes=1 << 30,
            max_write_nbytes=1 << 30,
            clock=lambda: time.monotonic() + offset[0],
            deadline=Deadlines(base_s=3600.0),
        )
        for job_id in range(N_IN_FLIGHT):
            worker.submit(ReadJob(job_id, [str(job_id)], [[]], 1))
        return worker, backend

    def end(worker: StorageWorker, backend: Closed) -> None:
        backend.gate.set()
        worker.close(10)

    worker, backend = start()
    wall, cpu = measure(worker.drain, repeat=repeat, number=1000)
    end(worker, backend)
    yield Row(
        table, "none late", "us", [s * 1e6 for s in wall], [s * 1e6 for s in cpu], target="< 500 us"
    )
    late: list[float] = []
    for _ in range(min(repeat, 7)):
        worker, backend = start()
        offset[0] += 7200
        wall, _ = measure(worker.drain, repeat=1)
        late += wall
        end(worker, backend)
    note = "once: tells of 4, starts 4 threads, cancels what waits"
    yield Row(table, "all late at once", "us", [s * 1e6 for s in late], note=note)
