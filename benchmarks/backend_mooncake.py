"""Mooncake over tcp, the data in another process: sealed pages against the bare client's calls.

Needs a mooncake_master beside the interpreter (``pip install 'hicache-mooncake[cpu]'``).
"""

from __future__ import annotations

import contextlib
import mmap
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hicache_mooncake import MooncakeBackend, MooncakeConfig
from hicache_mooncake.client import load_library
from hicache_mooncake.memory import address_of

from benchmarks.harness import Row, measure
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.types import BackendContext, Page

NAMESPACE = "0123456789abcdef"
BARE = "bare: batch calls, one buffer a page"
OURS = "hicache-mooncake, sealed"
STOCK = "stock: put and get of bytes"
SIZES = {"256 KiB": 1 << 18, "1 MiB": 1 << 20, "4 MiB": 1 << 22, "8 MiB": 1 << 23}
QUICK_NBYTES = 64 << 20
OWNER = """
import os, sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 0, "tcp", "", sys.argv[1])
print(code, flush=True)
sys.stdin.read()
os._exit(0)
"""

Work = Callable[[Sequence[int]], None]


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def servers(segment_nbytes: int) -> Iterator[str]:
    """A master, and a process that owns all the memory; the master's address."""
    binary = shutil.which("mooncake_master", path=str(Path(sys.executable).parent))
    if binary is None:
        raise SystemExit("no mooncake_master: pip install 'hicache-mooncake[cpu]'")
    rpc_port, metrics_port = free_port(), free_port()
    address = f"127.0.0.1:{rpc_port}"
    ports = [f"--rpc_port={rpc_port}", f"--metrics_port={metrics_port}"]
    hosts = ["--rpc_address=127.0.0.1", "--metrics_host=127.0.0.1"]
    options = [*ports, *hosts, "--default_kv_lease_ttl=5000"]
    master = subprocess.Popen(
        [binary, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/health", timeout=1),
            ):
                break
            time.sleep(0.05)
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, address, str(segment_nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        with owner:
            assert owner.stdout is not None
            owner.stdout.readline()
            yield address
            owner.kill()
    finally:
        master.kill()
        master.wait()


@dataclass
class World:
    """The clients of one run and the memory of a batch."""

    backend: MooncakeBackend
    sealed: SealedBackend
    store: Any
    memory: memoryview

    def pages(self, n_pages: int, nbytes: int) -> list[Page]:
        """Pages as the host pool makes them: headers in a side array behind the payloads."""
        headers = n_pages * nbytes
        return [
            (
                self.memory[headers + n * HEADER_NBYTES : headers + (n + 1) * HEADER_NBYTES],
                self.memory[n * nbytes : (n + 1) * nbytes],
            )
            for n in range(n_pages)
        ]


@contextlib.contextmanager
def world(address: str, memory_nbytes: int) -> Iterator[World]:
    """Clients without memory of their own to lend, on registered memory."""
    library = load_library()
    memory = memoryview(mmap.mmap(-1, memory_nbytes))
    memory[::4096] = b"\x01" * len(memory[::4096])
    config = MooncakeConfig(master_server_address=address, global_segment_size=0)
    backend = MooncakeBackend(config, BackendContext(NAMESPACE))
    backend.open()
    backend.register_memory([memory])
    store = library.MooncakeDistributedStore()
    store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", address)
    store.register_buffer(address_of(memory), memory.nbytes)
    try:
        yield World(backend, SealedBackend(backend), store, memory)
    finally:
        store.close()
        backend.close()


def keys_of(kind: str, n_pages: int) -> list[str]:
    """Keys of a batch; ``kind`` keeps the contenders apart."""
    return [f"{NAMESPACE}/{kind.encode().hex():0>32}{n:032x}" for n in range(n_pages)]


def contenders(place: World, n_pages: int, nbytes: int) -> dict[str, tuple[list[str], Work, Work]]:
    """For each contender its keys, and what writes and reads the pages of the given numbers."""
    pages = place.pages(n_pages, nbytes)
    base, store = address_of(place.memory), place.store
    bare, ours, stock = (keys_of(kind, n_pages) for kind in ("bare", "ours", "stock"))

    def bare_write(part: Sequence[int]) -> None:
        addresses = [base + n * nbytes for n in part]
        check(store.batch_put_from([bare[n] for n in part], addresses, [nbytes] * len(part)), 0)

    def bare_read(part: Sequence[int]) -> None:
        addresses = [base + n * nbytes for n in part]
        codes = store.batch_get_into([bare[n] for n in part], addresses, [nbytes] * len(part))
        check(codes, nbytes)

    def our_write(part: Sequence[int]) -> None:
        n = place.sealed.batch_set([ours[n] for n in part], [pages[n] for n in part])
        check([n], len(part))

    def our_read(part: Sequence[int]) -> None:
        n = place.sealed.batch_get([ours[n] for n in part], [pages[n] for n in part])
        check([n], len(part))

    def stock_write(part: Sequence[int]) -> None:
        check([store.put(stock[n], bytes(pages[n][1])) for n in part], 0)

    def stock_read(part: Sequence[int]) -> None:
        check([len(store.get(stock[n])) for n in part], nbytes)

    return {
        BARE: (bare, bare_write, bare_read),
        OURS: (ours, our_write, our_read),
        STOCK: (stock, stock_write, stock_read),
    }


def check(codes: Sequence[int], wanted: int) -> None:
    """A benchmark of calls that fail is worth nothing."""
    wrong = [code for code in codes if code != wanted]
    if wrong:
        raise SystemExit(f"mooncake answered {wrong[0]} instead of {wanted}")


def split(work: Work, n_pages: int, n_workers: int, pool: ThreadPoolExecutor) -> None:
    """The batch by so many workers, each a stretch of it."""
    if n_workers == 1:
        work(range(n_pages))
        return
    size = -(-n_pages // n_workers)
    parts = [range(start, min(n_pages, start + size)) for start in range(0, n_pages, size)]
    list(pool.map(work, parts))


def rows(quick: bool) -> Iterator[Row]:
    """Reads and writes of a batch by size and workers, then the latency of one page."""
    limit = QUICK_NBYTES if quick else 128 * max(SIZES.values())
    with servers(limit * 9 // 4) as address, world(address, limit + (1 << 20)) as place:
        for label, nbytes in SIZES.items():
            n_pages = min(128, limit // nbytes)
            for n_workers in (1, 4):
                yield from throughput(place, label, nbytes, n_pages, n_workers, quick=quick)
        for label in ("256 KiB", "1 MiB"):
            yield from latency(place, label, SIZES[label], quick=quick)


def throughput(
    place: World, label: str, nbytes: int, n_pages: int, n_workers: int, *, quick: bool
) -> Iterator[Row]:
    """MB/s of a batch, the contenders by turns so that noise meets them alike."""
    everyone = contenders(place, n_pages, nbytes)
    megabytes = n_pages * nbytes / 1e6
    samples: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    with ThreadPoolExecutor(n_workers) as pool:
        for _ in range(5 if quick else 7):
            for name, (keys, write, read) in everyone.items():
                for verb, work in (("write", write), ("read", read)):
                    wall, cpu = measure(lambda w=work: split(w, n_pages, n_workers, pool), repeat=1)  # type: ignore[misc]
                    lists = samples.setdefault((verb, name), ([], []))
                    lists[0].append(megabytes / wall[0])
                    lists[1].append(megabytes / max(cpu[0], 1e-9))
                place.backend.delete(keys)
    target = "≥ 0.85 × bare" if nbytes >= 1 << 20 else None
    for verb in ("read", "write"):
        table = f"Mooncake {verb}: {label}, {n_pages} pages, {n_workers} worker(s), tcp"
        for name in everyone:
            wall_samples, cpu_samples = samples[verb, name]
            yield Row(
                table,
                name,
                "MB/s",
                wall_samples,
                cpu_samples,
                baseline=None if name == BARE else BARE,
                target=target if name == OURS else None,
            )


def latency(place: World, label: str, nbytes: int, *, quick: bool) -> Iterator[Row]:
    """Time of a hit of a single page."""
    everyone = contenders(place, 1, nbytes)
    for _, write, _ in everyone.values():
        write([0])
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in everyone}
    for _ in range(10 if quick else 30):
        for name, (_, _, read) in everyone.items():
            wall, cpu = measure(lambda r=read: r([0]), repeat=1, number=10)  # type: ignore[misc]
            samples[name][0].append(wall[0] * 1e6)
            samples[name][1].append(cpu[0] * 1e6)
    for name, (keys, _, _) in everyone.items():
        place.backend.delete(keys)
        yield Row(
            f"Mooncake latency: a hit of one page of {label}, tcp",
            name,
            "us",
            *samples[name],
            baseline=None if name == BARE else BARE,
            target="≤ 1.3 × bare" if name == OURS else None,
        )
