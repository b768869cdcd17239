"""HF3FS in POSIX mode: sealed pages against bare pread and pwrite of the same objects.

Both write to a preallocated file of one directory (``HICACHE_BENCH_DIRECTORY``, else the temporary
one), through the page cache. USRBIO needs a 3FS mount and is not measured here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hicache_hf3fs import Hf3fsBackend, Hf3fsConfig

from benchmarks.harness import Row, measure
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.types import BackendContext, Page

NAMESPACE = "0123456789abcdef"
BARE = "bare pread, pwrite"
OURS = "hicache-hf3fs, sealed"
UNSEALED = "hicache-hf3fs, not sealed"
SIZES = {"256 KiB": 1 << 18, "1 MiB": 1 << 20, "4 MiB": 1 << 22, "8 MiB": 1 << 23}
QUICK_NBYTES = 64 << 20

Work = Callable[[Sequence[int]], None]


@dataclass
class World:
    """A backend with room for two batches, a bare file of one, and the memory of a batch."""

    backend: Hf3fsBackend
    sealed: SealedBackend
    bare_fd: int
    pages: list[Page]
    nbytes: int


@contextlib.contextmanager
def world(n_pages: int, nbytes: int) -> Iterator[World]:
    """Everything allocated, and touched once."""
    memory = memoryview(mmap.mmap(-1, n_pages * (nbytes + HEADER_NBYTES)))
    memory[::4096] = b"\x01" * len(memory[::4096])
    headers = n_pages * nbytes
    pages: list[Page] = [
        (
            memory[headers + n * HEADER_NBYTES : headers + (n + 1) * HEADER_NBYTES],
            memory[n * nbytes : (n + 1) * nbytes],
        )
        for n in range(n_pages)
    ]
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
            yield World(backend, SealedBackend(backend), fd, pages, nbytes)
        finally:
            os.close(fd)
            backend.close()


def keys_of(kind: str, n_pages: int) -> list[str]:
    """Keys of a batch; ``kind`` keeps the contenders apart."""
    return [f"{NAMESPACE}/{kind.encode().hex():0>32}{n:032x}" for n in range(n_pages)]


def contenders(place: World) -> dict[str, tuple[list[str], Work, Work]]:
    """For each contender its keys, and what writes and reads the pages of the given numbers."""
    pages, fd = place.pages, place.bare_fd
    object_nbytes = place.nbytes + HEADER_NBYTES

    def bare_write(part: Sequence[int]) -> None:
        for n in part:
            check(os.pwritev(fd, pages[n], n * object_nbytes), object_nbytes)

    def bare_read(part: Sequence[int]) -> None:
        for n in part:
            check(os.preadv(fd, pages[n], n * object_nbytes), object_nbytes)

    found: dict[str, tuple[list[str], Work, Work]] = {BARE: ([], bare_write, bare_read)}
    for name, backend, kind in (
        (OURS, place.sealed, "sealed"),
        (UNSEALED, place.backend, "raw"),
    ):
        keys = keys_of(kind, len(pages))

        def write(part: Sequence[int], backend: object = backend, keys: list[str] = keys) -> None:
            assert isinstance(backend, Hf3fsBackend | SealedBackend)
            check(backend.batch_set([keys[n] for n in part], [pages[n] for n in part]), len(part))

        def read(part: Sequence[int], backend: object = backend, keys: list[str] = keys) -> None:
            assert isinstance(backend, Hf3fsBackend | SealedBackend)
            check(backend.batch_get([keys[n] for n in part], [pages[n] for n in part]), len(part))

        found[name] = (keys, write, read)
    return found


def check(found: int, wanted: int) -> None:
    """A benchmark of calls that fail is worth nothing."""
    if found != wanted:
        raise SystemExit(f"{found} instead of {wanted}")


def split(work: Work, n_pages: int, n_workers: int, pool: ThreadPoolExecutor) -> None:
    """The batch by so many workers, each a stretch of it."""
    if n_workers == 1:
        work(range(n_pages))
        return
    size = -(-n_pages // n_workers)
    parts = [range(start, min(n_pages, start + size)) for start in range(0, n_pages, size)]
    list(pool.map(work, parts))


def forget(place: World, keys: list[str]) -> None:
    """Unbinds without a lease, so that the next round writes the same slots as the last."""
    with place.backend._calls.call() as store:
        store.metadata.delete(keys)
        store.metadata._writer.execute("UPDATE slots SET held_until = 0")  # type: ignore[attr-defined]


def rows(quick: bool) -> Iterator[Row]:
    """Reads and writes of a batch by size and workers, then one page, then the question."""
    limit = QUICK_NBYTES if quick else 128 * max(SIZES.values())
    for label, nbytes in SIZES.items():
        n_pages = min(128, limit // nbytes)
        with world(n_pages, nbytes) as place:
            for n_workers in (1, 4):
                yield from throughput(place, label, n_workers, quick=quick)
    for label in ("256 KiB", "1 MiB"):
        with world(1, SIZES[label]) as place:
            yield from latency(place, label, quick=quick)
    with world(128, 4096) as place:
        yield from exists(place, quick=quick)


def throughput(place: World, label: str, n_workers: int, *, quick: bool) -> Iterator[Row]:
    """MB/s of a batch, the contenders by turns so that noise meets them alike."""
    everyone, n_pages = contenders(place), len(place.pages)
    megabytes = n_pages * place.nbytes / 1e6
    samples: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    with ThreadPoolExecutor(n_workers) as pool:
        for turn in range(4 if quick else 8):
            for name, (keys, write, read) in everyone.items():
                for verb, work in (("write", write), ("read", read)):
                    wall, cpu = measure(lambda w=work: split(w, n_pages, n_workers, pool), repeat=1)  # type: ignore[misc]
                    if turn:  # the first touches fresh pages of the page cache
                        lists = samples.setdefault((verb, name), ([], []))
                        lists[0].append(megabytes / wall[0])
                        lists[1].append(megabytes / max(cpu[0], 1e-9))
                forget(place, keys)
    target = "≥ 0.85 × bare" if place.nbytes >= 1 << 20 else None
    for verb in ("read", "write"):
        table = f"HF3FS (POSIX) {verb}: {label}, {n_pages} pages, {n_workers} worker(s)"
        for name in everyone:
            yield Row(
                table,
                name,
                "MB/s",
                *samples[verb, name],
                baseline=None if name == BARE else BARE,
                target=target if name == OURS else None,
            )


def latency(place: World, label: str, *, quick: bool) -> Iterator[Row]:
    """Time of a hit of a single page."""
    everyone = contenders(place)
    for _, write, _ in everyone.values():
        write([0])
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in everyone}
    for _ in range(10 if quick else 30):
        for name, (_, _, read) in everyone.items():
            wall, cpu = measure(lambda r=read: r([0]), repeat=1, number=20)  # type: ignore[misc]
            samples[name][0].append(wall[0] * 1e6)
            samples[name][1].append(cpu[0] * 1e6)
    for name in everyone:
        yield Row(
            f"HF3FS (POSIX) latency: a hit of one page of {label}",
            name,
            "us",
            *samples[name],
            baseline=None if name == BARE else BARE,
            target="≤ 1.3 × bare" if name == OURS else None,
        )


def exists(place: World, *, quick: bool) -> Iterator[Row]:
    """Time for each key of the question whether 128 keys are there."""
    keys, write, _ = contenders(place)[UNSEALED]
    write(range(len(keys)))
    wall, cpu = measure(
        lambda: check(place.backend.batch_exists(keys), len(keys)), repeat=10 if quick else 30
    )
    yield Row(
        "HF3FS exists, for each of 128 keys (SQLite)",
        OURS,
        "us",
        [sample * 1e6 / len(keys) for sample in wall],
        [sample * 1e6 / len(keys) for sample in cpu],
    )
