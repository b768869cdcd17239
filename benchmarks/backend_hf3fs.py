"""HF3FS in POSIX mode: sealed pages against bare pread and pwrite of the same objects.

Both write to a preallocated file of one directory (``HICACHE_BENCH_DIRECTORY``, else the temporary
one), through the page cache. USRBIO needs a 3FS mount and is not measured here.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from hicache_hf3fs import Hf3fsBackend, Hf3fsConfig

from benchmarks.contest import (
    N_PAGES,
    NAMESPACE,
    SIZES,
    WORKERS,
    Contender,
    Contest,
    backend_contender,
    exists_rows,
    expect,
    gap_rows,
    keys_of,
    new_memory,
    pages_in,
)
from benchmarks.harness import Row
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.types import BackendContext, Page

BARE = "bare pread, pwrite"
OURS = "hicache-hf3fs, sealed"
UNSEALED = "hicache-hf3fs, not sealed"
QUICK_NBYTES = 64 << 20


@contextlib.contextmanager
def world(n_pages: int, size: str, nbytes: int) -> Iterator[tuple[Contest, Hf3fsBackend]]:
    """A backend with room for two batches, and a bare file of one."""
    pages = pages_in(new_memory(n_pages * (nbytes + HEADER_NBYTES)), n_pages, nbytes)
    object_nbytes = nbytes + HEADER_NBYTES
    with tempfile.TemporaryDirectory(dir=os.environ.get("HICACHE_BENCH_DIRECTORY")) as directory:
        config = Hf3fsConfig(
            file_path_prefix=Path(directory, "kv"),
            file_size=2 * n_pages * (object_nbytes + 8192),
            mode="posix",
        )
        backend = Hf3fsBackend(config, BackendContext(NAMESPACE, object_nbytes))
        backend.open()
        fd = os.open(Path(directory, "bare"), os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(fd, 0, n_pages * object_nbytes)
        try:
            everyone = contenders(backend, fd, pages, nbytes)
            yield Contest("HF3FS (POSIX)", size, nbytes, n_pages, everyone, BARE), backend
        finally:
            os.close(fd)
            backend.close()


def contenders(
    backend: Hf3fsBackend, fd: int, pages: Sequence[Page], nbytes: int
) -> list[Contender]:
    """The bare file, and the backend with and without seals."""
    object_nbytes = nbytes + HEADER_NBYTES

    def write(part: Sequence[int]) -> None:
        for n in part:
            expect(os.pwritev(fd, pages[n], n * object_nbytes), object_nbytes)

    def read(part: Sequence[int]) -> None:
        for n in part:
            expect(os.preadv(fd, pages[n], n * object_nbytes), object_nbytes)

    sealed, raw = keys_of("sealed", len(pages)), keys_of("raw", len(pages))
    return [
        Contender(BARE, read, write),
        backend_contender(
            OURS,
            SealedBackend(backend),
            lambda: sealed,
            pages,
            clean=partial(forget, backend, sealed),
            target="≥ 0.85 × bare" if nbytes >= 1 << 20 else None,
            hit_target="≤ 1.3 × bare",
        ),
        backend_contender(
            UNSEALED, backend, lambda: raw, pages, clean=partial(forget, backend, raw)
        ),
    ]


def forget(backend: Hf3fsBackend, keys: Sequence[str]) -> None:
    """Unbinds without a lease, so that the next round writes the same slots as the last."""
    with backend._calls.call() as store:
        store.metadata.delete(keys)
        store.metadata._writer.execute("UPDATE slots SET held_until = 0")  # type: ignore[attr-defined]


def rows(quick: bool) -> Iterator[Row]:
    """Reads and writes of a batch by size and workers, one page, the question, and gaps."""
    limit = QUICK_NBYTES if quick else N_PAGES * max(SIZES.values())
    for size, nbytes in SIZES.items():
        with world(min(N_PAGES, limit // nbytes), size, nbytes) as (contest, _):
            for n_workers in WORKERS:
                yield from contest.throughput(n_workers, 3 if quick else 7)
    for size in ("256 KiB", "1 MiB"):
        with world(1, size, SIZES[size]) as (contest, _):
            yield from contest.latency(10 if quick else 30, number=20)
    with world(N_PAGES, "4 KiB", 4096) as (contest, backend):
        (unsealed,) = (who for who in contest.contenders if who.name == UNSEALED)
        assert unsealed.write is not None
        unsealed.write(range(N_PAGES))
        keys = keys_of("raw", N_PAGES)
        calls = {OURS: lambda: expect(backend.batch_exists(keys), N_PAGES)}
        table = f"HF3FS exists, for each of {N_PAGES} keys (SQLite)"
        yield from exists_rows(table, calls, N_PAGES, 10 if quick else 30)
        pages = pages_in(new_memory(N_PAGES * (4096 + HEADER_NBYTES)), N_PAGES, 4096)
        yield from gap_rows("HF3FS (POSIX, SQLite)", backend, pages, 10 if quick else 30)
