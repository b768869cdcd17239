"""Two client processes share pages over tcp through one master."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hicache_mooncake import MooncakeBackend
from hicache_mooncake.errors import NOT_READY, OK

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


def test_pages_beside_one_that_another_process_is_writing_are_stored(
    make_master: Callable[..., Any],
    make_backend: Callable[..., MooncakeBackend],
    make_peer: Callable[..., Any],
) -> None:
    """The other process is stopped in the middle of its objects, which are nobody's until then."""
    master = make_master(flags=["--put_start_discard_timeout_sec=60"])
    backend = make_backend(master.address, ready_wait_s=0.2)
    peer = make_peer(master.address, global_segment_size=0)
    memory = memoryview(bytearray(os.urandom(1 << 20)))
    backend.register_memory([memory])
    theirs, ours = keys(8), [f"{'1' * 16}/{n:064x}" for n in range(8)]
    pages = [(memory[n * 1024 : (n + 1) * 1024],) for n in range(9)]
    try:
        busy = stopped_in_the_middle(peer, backend, theirs)
        mixed = [*ours[:4], busy, *ours[4:]]
        assert backend.set_each(mixed, pages) == [key != busy for key in mixed]
        assert backend.batch_set([busy, *ours], pages) == 0
        target = [(memory[(n + 20) * 1024 : (n + 21) * 1024],) for n in range(9)]
        assert backend.get_each(mixed, target) == [key != busy for key in mixed]
        for n, key in enumerate(mixed):
            assert key == busy or target[n] == pages[n]
    finally:
        peer.signal(signal.SIGCONT)
    peer.answer()


def stopped_in_the_middle(peer: Any, backend: MooncakeBackend, names: list[str]) -> str:
    """Stops a peer that is writing objects of these keys; one of those that it has not ended."""
    for _ in range(50):
        backend.clear("")
        peer.send(do="set", keys=names, nbytes=1 << 20, seeds=list(range(len(names))))
        codes: list[int] = []
        with backend.client.using() as store:
            while NOT_READY not in codes and set(codes) != {OK}:
                codes = store.batch_get_session_start(names)
            peer.signal(signal.SIGSTOP)
            codes = store.batch_get_session_start(names)
        if NOT_READY in codes:
            return names[codes.index(NOT_READY)]
        peer.signal(signal.SIGCONT)
        peer.answer()
    raise AssertionError("the other process was always faster")


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


@pytest.mark.full
def test_a_page_may_be_written_to_after_its_call_since_the_library_cancels_nothing(
    make_master: Callable[..., Any],
    make_backend: Callable[..., MooncakeBackend],
    make_peer: Callable[..., Any],
) -> None:
    """Why ``bounds_calls()`` is false. When this fails, Mooncake has changed for the better."""
    master = make_master()
    peer = make_peer(master.address, global_segment_size=256 << 20)
    backend = make_backend(master.address, global_segment_size=0)
    assert not backend.bounds_calls()
    memory = memoryview(bytearray(128 << 20))
    backend.register_memory([memory])
    pages = [(memory[n << 22 : (n + 1) << 22],) for n in range(32)]
    assert backend.batch_set(keys(32), pages) == 32
    memory[:] = b"\xee" * len(memory)
    over = threading.Event()

    def stop_at_first_byte() -> None:
        while memory[0] == 0xEE and not over.is_set():
            time.sleep(1e-4)
        peer.signal(signal.SIGSTOP)

    watcher = threading.Thread(target=stop_at_first_byte)
    watcher.start()
    try:
        assert backend.batch_get(keys(32), pages) < 32
        memory[:] = b"\x5a" * len(memory)
    finally:
        over.set()
        watcher.join()
        peer.signal(signal.SIGCONT)
    untouched = b"\x5a" * len(memory)
    deadline = time.monotonic() + 20
    while memory == untouched and time.monotonic() < deadline:
        time.sleep(0.1)
    assert memory != untouched


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
