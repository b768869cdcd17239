"""The file backend with checksums, next to bare reads and writes of the same objects."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import Row, measure
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.config import FileConfig
from hicache_core.storage.file.records import capacity_for
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
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

    def get(self, backend: SealedBackend) -> None:
        if backend.batch_get(self.keys, self.pages) != self.n_pages:
            raise RuntimeError("the backend lost pages")

    def write_one_file(self, name: str) -> None:
        fd = os.open(self.directory / name, os.O_RDWR | os.O_CREAT)
        for i, payload in enumerate(self.payloads):
            os.pwritev(fd, [payload], i * self.nbytes)
        os.close(fd)

    def read_one_file(self, name: str) -> None:
        fd = os.open(self.directory / name, os.O_RDONLY)
        for i, payload in enumerate(self.payloads):
            os.preadv(fd, [payload], i * self.nbytes)
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
    yield row("one file: get cold", lambda: bench.read_one_file("one"), bench.drop_cache)
    yield row("a file each: get cold", lambda: bench.read_files("each"), bench.drop_cache)
    yield row(
        "get cold",
        lambda: bench.get(backend),
        bench.drop_cache,
        baseline="one file: get cold",
        target=targets[2],
    )
    yield _exists_row(bench, backend, table, repeat)
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


def _exists_row(bench: Bench, backend: SealedBackend, table: str, repeat: int) -> Row:
    keys = bench.keys[:N_KEYS]
    wall, cpu = measure(lambda: backend.batch_exists(keys), repeat=repeat, number=200)
    return Row(
        table,
        f"exists, a key of {N_KEYS}",
        "us",
        [s / N_KEYS * 1e6 for s in wall],
        [s / N_KEYS * 1e6 for s in cpu],
        target="≤ 1.5 us",
    )
