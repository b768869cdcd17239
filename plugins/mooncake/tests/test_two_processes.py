"""Two client processes share pages over tcp through one master."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from hicache_mooncake import MooncakeBackend

NBYTES = 256 * 1024


def keys(n: int) -> list[str]:
    return [f"{'0' * 16}/{i:064x}" for i in range(n)]


def test_what_one_process_stores_the_other_reads_in_place(
    master: Any, backend: MooncakeBackend, make_peer: Callable[..., Any]
) -> None:
    peer = make_peer(master.address)
    memory = memoryview(bytearray(16 * NBYTES))
    backend.register_memory([memory])
    pages = [
        (memory[n * NBYTES : n * NBYTES + 64], memory[n * NBYTES + 64 : (n + 1) * NBYTES])
        for n in range(16)
    ]
    staged_before = backend.stats()["staged_pages"]

    assert peer.ask(do="set", keys=keys(8), nbytes=NBYTES, seeds=list(range(8))) == 8
    assert backend.batch_get(keys(8), pages[:8]) == 8
    for n in range(8):
        assert memory[n * NBYTES : (n + 1) * NBYTES] == random.Random(n).randbytes(NBYTES)

    for n in range(8, 16):
        memory[n * NBYTES : (n + 1) * NBYTES] = random.Random(n).randbytes(NBYTES)
    assert backend.batch_set(keys(16)[8:], pages[8:]) == 8
    assert (
        peer.ask(do="get", keys=keys(16)[8:], nbytes=NBYTES, seeds=list(range(8, 16))) == [True] * 8
    )
    assert backend.stats()["staged_pages"] == staged_before


def test_two_processes_that_write_the_same_keys_at_once_both_read_them_whole(
    master: Any, backend: MooncakeBackend, make_peer: Callable[..., Any]
) -> None:
    peer = make_peer(master.address)
    memory = memoryview(bytearray(16 * NBYTES))
    backend.register_memory([memory])
    pages = [(memory[n * NBYTES : (n + 1) * NBYTES],) for n in range(16)]
    for n in range(16):
        pages[n][0][:] = random.Random(n).randbytes(NBYTES)
    peer.send(do="set", keys=keys(16), nbytes=NBYTES, seeds=list(range(16)))
    assert backend.batch_set(keys(16), pages) == 16
    assert peer.answer() == 16
    memory[:] = bytes(len(memory))
    assert backend.batch_get(keys(16), pages) == 16
    for n in range(16):
        assert pages[n][0] == random.Random(n).randbytes(NBYTES)
    seeds = list(range(16))
    assert peer.ask(do="get", keys=keys(16), nbytes=NBYTES, seeds=seeds) == [True] * 16


def test_pages_of_thousands_of_segments_cross_tcp_from_several_threads(
    make_master: Callable[..., Any],
    make_backend: Callable[..., MooncakeBackend],
    make_peer: Callable[..., Any],
) -> None:
    """The transport fails what exceeds its queue: 4 threads, 16 pages, 300 segments a page."""
    master = make_master()
    make_peer(master.address)
    backend = make_backend(master.address, global_segment_size=0)
    memory = memoryview(bytearray(os.urandom(8 << 20)))
    backend.register_memory([memory])
    n_moved: list[int] = []

    def work(worker: int) -> None:
        names = [f"{worker:016x}/{n:064x}" for n in range(16)]
        starts = [(worker * 16 + n) << 16 for n in range(16)]
        pages = [[memory[s + i * 200 : s + i * 200 + 100] for i in range(300)] for s in starts]
        before = [b"".join(page) for page in pages]
        n_moved.append(backend.batch_set(names, pages))
        n_moved.append(backend.batch_get(names, pages))
        assert [b"".join(page) for page in pages] == before

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert n_moved == [16] * 8


def test_pages_of_a_server_that_died_are_misses_and_never_wrong(
    make_master: Callable[..., Any],
    make_backend: Callable[..., MooncakeBackend],
    make_peer: Callable[..., Any],
) -> None:
    master = make_master()
    peer = make_peer(master.address)
    assert peer.ask(do="set", keys=keys(4), nbytes=NBYTES, seeds=[0, 1, 2, 3]) == 4
    backend = make_backend(master.address, global_segment_size=0)
    memory = memoryview(bytearray(4 * NBYTES))
    backend.register_memory([memory])
    pages = [(memory[n * NBYTES : (n + 1) * NBYTES],) for n in range(4)]
    assert backend.batch_get(keys(4), pages) == 4
    peer.kill()
    start = time.monotonic()
    assert backend.batch_get(keys(4), pages) == 0
    assert time.monotonic() - start < 5
    assert backend.stats()["misses_transfers_failed"] + backend.stats().get("misses_missing", 0)
