"""Mooncake over tcp, the data in another process: sealed pages against the bare client's calls.

Needs a mooncake_master beside the interpreter (``pip install 'hicache-mooncake[cpu]'``).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hicache_mooncake import MooncakeBackend, MooncakeConfig
from hicache_mooncake.client import load_library
from hicache_mooncake.memory import address_of

from benchmarks.contest import (
    N_PAGES,
    NAMESPACE,
    SIZES,
    WORKERS,
    Contender,
    Contest,
    backend_contender,
    expect,
    gap_rows,
    keys_of,
    new_memory,
    pages_in,
)
from benchmarks.harness import Row
from hicache_core.storage.sealed import SealedBackend
from hicache_core.types import BackendContext
from tests.servers.mooncake import running_mooncake

BARE = "bare: batch calls, one buffer a page"
OURS = "hicache-mooncake, sealed"
STOCK = "stock: put and get of bytes"
QUICK_NBYTES = 64 << 20
# As many as it has by default: the tests make do with two.
MASTER_FLAGS = ("--rpc_thread_num=0",)


@dataclass
class World:
    """The clients of one run and their registered memory."""

    backend: MooncakeBackend
    store: Any
    memory: memoryview

    def contest(self, size: str, n_pages: int) -> Contest:
        """Everybody, on a batch of pages of this size."""
        nbytes = SIZES[size]
        everyone = contenders(self, n_pages, nbytes)
        return Contest("Mooncake, tcp,", size, nbytes, n_pages, everyone, BARE, n_warm_up=0)


@contextlib.contextmanager
def world(address: str, memory_nbytes: int) -> Iterator[World]:
    """Clients without memory of their own to lend, on registered memory."""
    library = load_library()
    memory = new_memory(memory_nbytes)
    config = MooncakeConfig(master_server_address=address, global_segment_size=0)
    backend = MooncakeBackend(config, BackendContext(NAMESPACE))
    backend.open()
    backend.register_memory([memory])
    store = library.MooncakeDistributedStore()
    store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", address)
    store.register_buffer(address_of(memory), memory.nbytes)
    try:
        yield World(backend, store, memory)
    finally:
        store.close()
        backend.close()


def contenders(place: World, n_pages: int, nbytes: int) -> list[Contender]:
    """The client's batch calls, the backend, and the client as people use it."""
    pages = pages_in(place.memory, n_pages, nbytes)
    base, store = address_of(place.memory), place.store
    bare, ours, stock = (keys_of(kind, n_pages) for kind in ("bare", "ours", "stock"))
    clean = [partial(place.backend.delete, keys) for keys in (bare, ours, stock)]

    def bare_call(call: Any, wanted: int, part: Sequence[int]) -> None:
        addresses = [base + n * nbytes for n in part]
        codes = call([bare[n] for n in part], addresses, [nbytes] * len(part))
        expect(list(codes), [wanted] * len(part))

    def stock_write(part: Sequence[int]) -> None:
        expect([store.put(stock[n], bytes(pages[n][1])) for n in part], [0] * len(part))

    def stock_read(part: Sequence[int]) -> None:
        expect([len(store.get(stock[n])) for n in part], [nbytes] * len(part))

    return [
        Contender(
            BARE,
            partial(bare_call, store.batch_get_into, nbytes),
            partial(bare_call, store.batch_put_from, 0),
            clean[0],
        ),
        backend_contender(
            OURS,
            SealedBackend(place.backend),
            lambda: ours,
            pages,
            clean=clean[1],
            target="≥ 0.85 × bare" if nbytes >= 1 << 20 else None,
            hit_target="≤ 1.3 × bare",
        ),
        Contender(STOCK, stock_read, stock_write, clean[2]),
    ]


def rows(quick: bool) -> Iterator[Row]:
    """Reads and writes of a batch by size and workers, one page, then the price of gaps."""
    limit = QUICK_NBYTES if quick else N_PAGES * max(SIZES.values())
    with (
        tempfile.TemporaryDirectory(prefix="hicache-mooncake-") as directory,
        running_mooncake(Path(directory), limit * 9 // 4, MASTER_FLAGS) as master,
        world(master.address, limit + (1 << 20)) as place,
    ):
        for size, nbytes in SIZES.items():
            contest = place.contest(size, min(N_PAGES, limit // nbytes))
            for n_workers in WORKERS:
                yield from contest.throughput(n_workers, 5 if quick else 7)
        for size in ("256 KiB", "1 MiB"):
            yield from place.contest(size, 1).latency(10 if quick else 30, number=10)
        pages = pages_in(place.memory, N_PAGES, SIZES["256 KiB"])
        yield from gap_rows("Mooncake (tcp)", place.backend, pages, 5 if quick else 15)
