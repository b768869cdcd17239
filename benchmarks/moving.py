"""Moving stores: ``hicache copy`` between file stores beside ``cp``, and from Redis beside reading.

The source is in the page cache, or in the memory of the server. Each sample writes into a new
directory, which is removed afterwards; the contenders take turns.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from hicache_redis import RedisBackend, RedisConfig

from benchmarks.harness import Row, measure
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.config import FileConfig
from hicache_core.storage.moving.archive import Head, Planned
from hicache_core.storage.moving.archive_reader import ArchiveReader, refuses_nothing
from hicache_core.storage.moving.archive_writer import ArchiveWriter
from hicache_core.storage.moving.base import Source, Target
from hicache_core.storage.moving.mover import DEFAULT_THREADS, make_slabs, move
from hicache_core.storage.moving.store import Part, StoreReader, StoreWriter
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.types import BackendContext, Page
from tests.servers.valkey import running

NAMESPACE = "0123456789abcdef"
PARTS = [Part(NAMESPACE)]
SIZES = ((1 << 20, "1 MiB"), (1 << 17, "128 KiB"))
BATCH_NBYTES = 8 << 20


class Bench:
    """Objects of one size in a source, and the ways to get them elsewhere."""

    def __init__(self, folder: Path, nbytes: int, total_nbytes: int) -> None:
        """Makes the objects; ``fill`` stores them.

        Args:
            folder: for stores.
            nbytes: of an object, header included.
            total_nbytes: of all objects.
        """
        self.folder = folder
        self.nbytes = nbytes
        self.total_nbytes = total_nbytes
        self.keys = [f"{NAMESPACE}/{n:064x}" for n in range(total_nbytes // nbytes)]
        self.numbers = iter(range(1 << 30))
        self.made: list[Path] = []

    def fill(self, store: StorageBackend) -> None:
        """Stores the objects, sealed."""
        payload = memoryview(bytearray(os.urandom(self.nbytes - HEADER_NBYTES)))
        header = memoryview(bytearray(HEADER_NBYTES))
        sealed = SealedBackend(store)
        for n, key in enumerate(self.keys):
            payload[:8] = n.to_bytes(8)
            if sealed.batch_set([key], [(header, payload)]) != 1:
                raise RuntimeError("the store has too little room")

    def new(self) -> Path:
        """A name for a new store; the ones before are removed."""
        self.remove()
        self.made.append(self.folder / f"new{next(self.numbers)}")
        return self.made[-1]

    def remove(self) -> None:
        """Removes what was written."""
        while self.made:
            shutil.rmtree(self.made.pop(), ignore_errors=True)

    def file(self, path: Path) -> FileBackend:
        """A file store, open."""
        context = BackendContext(NAMESPACE, object_nbytes=self.nbytes)
        backend = FileBackend(FileConfig(path=path), context)
        backend.open()
        return backend

    def moved(self, source: Source, target: Target) -> None:
        """Moves everything, as the commands do."""
        slabs = make_slabs(DEFAULT_THREADS, self.nbytes)
        totals = move(source, target, slabs, lambda _: None)
        if not totals.is_whole or totals.copied_nbytes != self.total_nbytes:
            raise RuntimeError(f"not everything arrived: {totals}")

    def copied(self, source: StorageBackend) -> None:
        """Copies a store into the new one."""
        with closing(self.file(self.made[-1])) as target:
            self.moved(StoreReader(source, PARTS, refuses_nothing), StoreWriter(target))

    def read(self, source: StorageBackend) -> None:
        """Reads everything with its seals checked, on as many threads as a move has."""
        sealed = SealedBackend(source)
        n = max(1, BATCH_NBYTES // self.nbytes)
        batches = iter([self.keys[start : start + n] for start in range(0, len(self.keys), n)])
        lock = threading.Lock()

        def run(pages: Sequence[Page]) -> None:
            while True:
                with lock:
                    batch = next(batches, None)
                if batch is None:
                    return
                if not all(sealed.get_each(batch, pages[: len(batch)])):
                    raise RuntimeError("the store lost pages")

        memory = [make_slabs(1, self.nbytes)[0].cut(self.nbytes, n) for _ in range(DEFAULT_THREADS)]
        pages = [[(one[:HEADER_NBYTES], one[HEADER_NBYTES:]) for one in own] for own in memory]
        threads = [threading.Thread(target=run, args=(own,)) for own in pages]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def rows(quick: bool) -> Iterator[Row]:
    """Copies and archives of file stores beside ``cp``; copies of Redis beside reading it."""
    total_nbytes, repeat = (128 << 20, 3) if quick else (512 << 20, 9)
    for nbytes, label in SIZES:
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="hicache-bench-"))
            stack.callback(shutil.rmtree, folder)
            bench = Bench(folder, nbytes, total_nbytes)
            title = f"{label} × {len(bench.keys)}"
            yield from _file_rows(bench, f"moving a file store, {title}", repeat)
            yield from _redis_rows(bench, f"moving from Redis to a file store, {title}", repeat)


def _file_rows(bench: Bench, table: str, repeat: int) -> Iterator[Row]:
    path, archive = bench.folder / "source", bench.folder / "source.tar"
    with closing(bench.file(path)) as source:
        bench.fill(source)

        def export() -> None:
            archive.unlink(missing_ok=True)
            with archive.open("xb", 0) as file:
                writer = ArchiveWriter(file)
                writer.begin(Head("", "", {NAMESPACE: Planned(len(bench.keys), bench.nbytes)}))
                bench.moved(StoreReader(source, PARTS, refuses_nothing), writer)
                writer.finish()

        def take() -> None:
            with archive.open("rb", 0) as file, closing(bench.file(bench.made[-1])) as target:
                bench.moved(ArchiveReader(file, refuses_nothing), StoreWriter(target))

        ways = {
            "cp -r": lambda: subprocess.run(["cp", "-r", path, bench.made[-1]], check=True),
            "hicache copy": lambda: bench.copied(source),
            "hicache export": export,
            "hicache import": take,
        }
        targets = {"hicache copy": "≥ 0.85 × cp -r"}
        yield from _in_turn(bench, table, ways, targets, repeat)
    bench.remove()
    archive.unlink()
    shutil.rmtree(path)


def _redis_rows(bench: Bench, table: str, repeat: int) -> Iterator[Row]:
    with running() as server:
        context = BackendContext(NAMESPACE, object_nbytes=bench.nbytes)
        source = RedisBackend(RedisConfig.model_validate({"url": server.url}), context)
        source.open()
        with closing(source):
            bench.fill(source)
            ways = {
                "reading Redis, sealed": lambda: bench.read(source),
                "hicache copy": lambda: bench.copied(source),
            }
            targets = {"hicache copy": "≥ 0.85 × reading Redis, sealed"}
            yield from _in_turn(bench, table, ways, targets, repeat)
    bench.remove()


def _in_turn(
    bench: Bench,
    table: str,
    ways: Mapping[str, Callable[[], object]],
    targets: dict[str, str],
    repeat: int,
) -> Iterator[Row]:
    """One row for each way, the first of which is the baseline of the others."""
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for turn in range(repeat + 1):
        for name, way in ways.items():
            before_s = _cpu_of_children()
            wall, cpu = measure(way, repeat=1, setup=bench.new)
            cpu_s = cpu[0] + _cpu_of_children() - before_s
            if turn:  # the first one warms up
                samples[name][0].append(bench.total_nbytes / 1e6 / wall[0])
                samples[name][1].append(bench.total_nbytes / 1e6 / cpu_s)
    first = next(iter(ways))
    for name, (speed, cpu_speed) in samples.items():
        baseline = None if name == first else first
        yield Row(table, name, "MB/s", speed, cpu_speed, baseline, targets.get(name))


def _cpu_of_children() -> float:
    """Seconds of CPU time of the processes that have ended: of ``cp``."""
    times = os.times()
    return times.children_user + times.children_system
