"""The file backend with checksums, next to bare reads and writes of the same objects."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Row, measure
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.config import FileConfig
from hicache_core.storage.file.index import move
from hicache_core.storage.file.records import BLOCK_NBYTES, SEGMENT_NBYTES, capacity_for
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend, checksum
from hicache_core.types import BackendContext

N_KEYS = 128


class Bench:
    """Objects of one size, and three ways to keep them: the backend, one file, a file each."""

    def __init__(self, directory: Path, nbytes: int, n_pages: int) -> None:
        self.directory = directory
        self.nbytes = nbytes
        self.n_pages = n_pages
        memory = memoryview(bytearray(os.urandom(1 << 20)) * (n_pages * nbytes >> 20))
        self.payloads = [memory[i * nbytes : (i + 1) * nbytes] for i in range(n_pages)]
        headers = [memoryview(bytearray(HEADER_NBYTES)) for _ in range(n_pages)]
        self.pages = list(zip(headers, self.payloads, strict=True))
        self.numbers = itertools.count()
        self.backends: list[SealedBackend] = []
        self.keys: list[str] = []

    def backend(self) -> SealedBackend:
        """A backend on a new directory whose cap is just above one batch."""
        cap = (self.n_pages + 1) * capacity_for(HEADER_NBYTES + self.nbytes)
        config = FileConfig(path=self.directory / f"store{next(self.numbers)}", max_nbytes=cap)
        backend = SealedBackend(FileBackend(config, BackendContext(namespace="0" * 16)))
        backend.open()
        self.backends.append(backend)
        return backend

    def new_keys(self) -> None:
        start = next(self.numbers) * self.n_pages
        self.keys = [f"{0:016x}/{start + i:064x}" for i in range(self.n_pages)]

    def set(self, backend: SealedBackend) -> None:
        if backend.batch_set(self.keys, self.pages) != self.n_pages:
            raise RuntimeError("the backend dropped pages")

    def get(self, backend: StorageBackend) -> None:
        if backend.batch_get(self.keys, self.pages) != self.n_pages:
            raise RuntimeError("the backend lost pages")

    def write_one_file(self, name: str) -> None:
        fd = os.open(self.directory / name, os.O_RDWR | os.O_CREAT)
        for i, payload in enumerate(self.payloads):
            os.pwritev(fd, [payload], i * self.nbytes)
        os.close(fd)

    def read_one_file(
        self, name: str, arrived: Callable[[Sequence[memoryview]], object] = lambda _: None
    ) -> None:
        fd = os.open(self.directory / name, os.O_RDONLY)
        for i, payload in enumerate(self.payloads):
            os.preadv(fd, [payload], i * self.nbytes)
            arrived([payload])
        os.close(fd)

    def write_files(self, name: str) -> None:
        for i, payload in enumerate(self.payloads):
            path = f"{self.directory / name}.{i}"
            fd = os.open(f"{path}.part", os.O_WRONLY | os.O_CREAT)
            os.pwritev(fd, [payload], 0)
            os.close(fd)
            os.rename(f"{path}.part", path)

    def read_files(self, name: str) -> None:
        for i, payload in enumerate(self.payloads):
            fd = os.open(f"{self.directory / name}.{i}", os.O_RDONLY)
            os.preadv(fd, [payload], 0)
            os.close(fd)

    def drop_cache(self) -> None:
        """Puts everything on the disk and out of the page cache."""
        for path in self.directory.rglob("*"):
            if path.is_file() and path.suffix not in (".sqlite", ".lock"):
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)

    def remove_stores(self) -> None:
        for backend in self.backends:
            backend.close()
        self.backends.clear()
        for store in self.directory.glob("store*"):
            shutil.rmtree(store)

    def remove_files(self) -> None:
        for path in self.directory.iterdir():
            if path.is_file():
                path.unlink()


def rows(quick: bool) -> Iterator[Row]:
    """Sets, warm and cold gets of 1 MiB and 64 KiB pages, then questions."""
    for nbytes, n_pages, label in ((1 << 20, 128, "1 MiB × 128"), (1 << 16, 512, "64 KiB × 512")):
        directory = Path(tempfile.mkdtemp(prefix="hicache-bench-"))
        bench = Bench(directory, nbytes, n_pages)
        try:
            yield from _size_rows(bench, f"file backend, {label}", 3 if quick else 9)
        finally:
            bench.remove_stores()
            shutil.rmtree(directory)
    yield from _opening_rows(1 << 16 if quick else 1_000_000, 3 if quick else 5)


def _opening_rows(n_objects: int, repeat: int) -> Iterator[Row]:
    """Opening a store of many objects, and asking for some of them.

    Its index has rows as publishing makes them, with keys in random order; the segment files are
    holes.
    """
    with tempfile.TemporaryDirectory(prefix="hicache-bench-") as directory:
        config = FileConfig(path=Path(directory, "store"), max_nbytes=1 << 50)
        keys = [f"{0:016x}/{random.Random(n).randbytes(32).hex()}" for n in range(n_objects)]
        with contextlib.closing(_opened(config)) as backend:
            _add_objects(backend, keys)
        table = f"file backend, {n_objects:,} objects"
        opened: list[FileBackend] = []

        def close_last() -> None:
            while opened:
                opened.pop().close()

        wall, cpu = measure(lambda: opened.append(_opened(config)), repeat=repeat, setup=close_last)
        yield Row(table, "open", "s", wall, cpu, target="≤ 3 s")
        with contextlib.closing(opened.pop()) as backend:
            asked = keys[:: len(keys) // N_KEYS][:N_KEYS]
            if backend.batch_exists(asked) != N_KEYS:
                raise RuntimeError("the backend lost keys")
            yield _exists_row(asked, backend, table, 5 * repeat)
        yield from _looking_rows(config.path, keys[0].partition("/")[0], table, repeat)


def _looking_rows(path: Path, namespace: str, table: str, repeat: int) -> Iterator[Row]:
    """``hicache ls`` and ``du`` of the store, each a process of its own, and their memory.

    The memory is the most that a process had resident, with Python and what it imports.
    """
    settings = json.dumps({"path": str(path)})
    for words in (["ls", "file"], ["du", "file"], ["ls", "file", namespace]):
        command = [sys.executable, "-c", _WATCHED, *words, "--config", settings]
        wall, cpu, most_mb = [], [], 0.0
        for _ in range(repeat):
            started = time.perf_counter()
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True
            )
            wall.append(time.perf_counter() - started)
            cpu_s, most_kib = done.stderr.split()
            cpu.append(float(cpu_s))
            most_mb = max(most_mb, int(most_kib) * 1024 / 1e6)
        name = "hicache " + words[0] + (", all keys of a namespace" if len(words) > 2 else "")
        note = f"{most_mb:.0f} MB resident at most"
        yield Row(table, name, "s", wall, cpu, target="≤ 3 s", note=note)


_WATCHED = """
import re, sys, time
from hicache_core.cli.main import main
try:
    main(sys.argv[1:])
finally:
    (most,) = re.findall("VmHWM: *(.*) kB", open("/proc/self/status").read().replace("\t", " "))
    print(time.process_time(), most, file=sys.stderr)
"""
"""Runs a command; then says its CPU time, and the most memory that it had resident."""


def _opened(config: FileConfig) -> FileBackend:
    backend = FileBackend(config, BackendContext(namespace="0" * 16))
    backend.open()
    return backend


def _add_objects(backend: FileBackend, keys: Sequence[str]) -> None:
    """Publishes objects of 4 KiB without writing them."""
    capacity = capacity_for(HEADER_NBYTES + 4096)
    in_segment = (SEGMENT_NBYTES - BLOCK_NBYTES) // capacity
    n_segments = -(-len(keys) // in_segment)
    with backend._calls.call() as store, store.index.transaction() as connection:
        for segment in range(1, n_segments + 1):
            store.records.create(segment)
            connection.execute("INSERT INTO segments VALUES (?, ?)", (segment, SEGMENT_NBYTES))
        connection.executemany(
            "INSERT INTO extents (segment, offset, capacity, generation, seq, key, nbytes, "
            "written_at, used_at) VALUES (?, ?, ?, 1, 1, ?, ?, ?, ?)",
            (
                (
                    *(1 + n // in_segment, BLOCK_NBYTES + n % in_segment * capacity, capacity),
                    *(key, HEADER_NBYTES + 4096, 1e9 + n, 1e9 + n),
                )
                for n, key in enumerate(keys)
            ),
        )
        move(connection, "seq")
        move(connection, "segment", n_segments)
        move(connection, "held", len(keys) * capacity)


def _size_rows(bench: Bench, table: str, repeat: int) -> Iterator[Row]:
    nbytes = bench.nbytes * bench.n_pages

    def row(
        name: str,
        fn: Callable[[], object],
        setup: Callable[[], object] | None = None,
        *,
        baseline: str | None = None,
        target: str | None = None,
        note: str = "",
    ) -> Row:
        wall, cpu = measure(fn, repeat=repeat, setup=setup)
        speed, cpu_speed = ([nbytes / 1e6 / s for s in samples] for samples in (wall, cpu))
        return Row(table, name, "MB/s", speed, cpu_speed, baseline, target, note)

    one_mib = bench.nbytes == 1 << 20
    targets = ("≥ 4,000 or 85 %", "≥ 9,000 or 85 %", "≥ 1,700 or 85 %") if one_mib else (None,) * 3
    backend = bench.backend()
    for _ in range(2):
        bench.new_keys()
        bench.set(backend)
    bench.write_one_file("one")
    bench.write_files("each")
    again, fresh = "written over what was there", "a new file"
    yield row("one file: set", lambda: bench.write_one_file("one"), note=again)
    yield row(
        "set",
        lambda: bench.set(backend),
        bench.new_keys,
        baseline="one file: set",
        target=targets[0],
        note="at the cap: evicts as much as it stores",
    )
    yield row("one file: get warm", lambda: bench.read_one_file("one"))
    yield row("a file each: get warm", lambda: bench.read_files("each"))
    yield row(
        "get warm",
        lambda: bench.get(backend),
        baseline="one file: get warm",
        target=targets[1],
    )
    yield row(
        "get warm, seals not checked",
        lambda: bench.get(backend.inner),
        baseline="get warm",
        target="≤ 1.15 ×" if one_mib else None,
    )
    yield row(
        "one file: get warm, and xxh3-64 of each",
        lambda: bench.read_one_file("one", checksum),
        baseline="one file: get warm",
        note="what the checksum alone costs",
    )
    yield row("one file: get cold", lambda: bench.read_one_file("one"), bench.drop_cache)
    yield row("a file each: get cold", lambda: bench.read_files("each"), bench.drop_cache)
    yield row(
        "get cold",
        lambda: bench.get(backend),
        bench.drop_cache,
        baseline="one file: get cold",
        target=targets[2],
    )
    yield _exists_row(bench.keys[:N_KEYS], backend, table, repeat)
    clear = bench.remove_files
    yield row("one file: set new", lambda: bench.write_one_file("one"), clear, note=fresh)
    yield row("a file each: set new", lambda: bench.write_files("each"), clear, note=fresh)
    empty: list[SealedBackend] = []

    def start_empty() -> None:
        bench.new_keys()
        bench.remove_stores()  # as the rows above do, whose files are removed before each sample
        empty[:] = [bench.backend()]

    yield row(
        "set new",
        lambda: bench.set(empty[0]),
        start_empty,
        baseline="one file: set new",
        note="an empty store",
    )


def _exists_row(keys: Sequence[str], backend: StorageBackend, table: str, repeat: int) -> Row:
    wall, cpu = measure(lambda: backend.batch_exists(keys), repeat=repeat, number=200)
    return Row(
        table,
        f"exists, a key of {N_KEYS}",
        "us",
        [s / N_KEYS * 1e6 for s in wall],
        [s / N_KEYS * 1e6 for s in cpu],
        target="≤ 1.5 us",
    )
