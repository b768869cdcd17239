"""The Redis backend beside a bare socket and beside redis-py, on one Valkey server.

Each table is one size of page. Every row moves the same pages of one batch over loopback TCP,
split among the workers; rows take turns, so that the noise of the machine hits them alike.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import redis
from hicache_redis import RedisBackend, RedisConfig

from benchmarks.harness import Row, measure
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.types import BackendContext, Page
from tests.servers.valkey import Valkey, running

SIZES = (256 << 10, 1 << 20, 4 << 20, 8 << 20)
N_PAGES = 128
NAMESPACE = "be0c4a5de0000000"
PREFIX = "hicache:"
WORKERS = (1, 4)


class BareClient:
    """What a raw socket can do: ``sendall`` and ``recv_into`` with MSG_WAITALL, pipelined."""

    def __init__(self, port: int) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read(self, keys: Sequence[str], pages: Sequence[memoryview]) -> None:
        """GET of every key into its page."""
        names = [(PREFIX + key).encode() for key in keys]
        commands = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name) for name in names]
        self._sock.sendall(b"".join(commands))
        for page in pages:
            head = b"$%d\r\n" % page.nbytes
            assert self._sock.recv(len(head), socket.MSG_WAITALL) == head
            n_read = 0
            while n_read < page.nbytes:
                n_read += self._sock.recv_into(page[n_read:], 0, socket.MSG_WAITALL)
            self._sock.recv(2, socket.MSG_WAITALL)

    def write(self, keys: Sequence[str], pages: Sequence[memoryview]) -> None:
        """SET of every page."""
        for key, page in zip(keys, pages, strict=True):
            name = (PREFIX + key).encode()
            head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n"
            self._sock.sendall(head % (len(name), name, page.nbytes))
            self._sock.sendall(page)
            self._sock.sendall(b"\r\n")
        assert self._sock.recv(5 * len(keys), socket.MSG_WAITALL) == b"+OK\r\n" * len(keys)

    def close(self) -> None:
        """Hangs up."""
        self._sock.close()


class StockClient:
    """redis-py with hiredis, as people use it.

    What ``get`` returns is dropped at once, so the next reply lands in the same warm memory; that
    is no cache yet. ``get_into`` does the job of the other rows: the bytes end up in the pages.
    """

    def __init__(self, port: int) -> None:
        self._client: Any = redis.Redis(port=port)

    def get(self, keys: Sequence[str]) -> None:
        """``get`` of each key."""
        for key in keys:
            self._client.get(PREFIX + key)

    def get_into(self, keys: Sequence[str], pages: Sequence[memoryview]) -> None:
        """``get`` of each key, copied into its page."""
        for key, page in zip(keys, pages, strict=True):
            page[:] = self._client.get(PREFIX + key)

    def mget_into(self, keys: Sequence[str], pages: Sequence[memoryview]) -> None:
        """``mget``, eight keys a call, copied into the pages."""
        for start in range(0, len(keys), 8):
            values = self._client.mget([PREFIX + key for key in keys[start : start + 8]])
            for page, value in zip(pages[start:], values, strict=False):
                page[:] = value

    def set(self, keys: Sequence[str], pages: Sequence[memoryview]) -> None:
        """``set`` of each page."""
        for key, page in zip(keys, pages, strict=True):
            self._client.set(PREFIX + key, page)

    def close(self) -> None:
        """Closes its connections."""
        self._client.close()


class Bench:
    """The pages of one size, and every client that moves them."""

    def __init__(self, server: Valkey, nbytes: int, n_pages: int, stack: ExitStack) -> None:
        """Connects everything; ``stack`` disconnects it."""
        self.keys = [f"{NAMESPACE}/{n:064x}" for n in range(n_pages)]
        whole = [memoryview(bytearray(nbytes)) for _ in range(n_pages)]
        self.whole: list[memoryview] = whole
        self.pages: list[Page] = [(w[:HEADER_NBYTES], w[HEADER_NBYTES:]) for w in whole]
        for n, page in enumerate(whole):
            page[HEADER_NBYTES:] = n.to_bytes(1) * (nbytes - HEADER_NBYTES)
        self.bare = [BareClient(server.port) for _ in range(max(WORKERS))]
        self.stock = StockClient(server.port)
        self.plain = RedisBackend(RedisConfig.model_validate({"url": server.url}), _CONTEXT)
        self.sealed = SealedBackend(self.plain)
        self.sealed.open()
        for close in (*(bare.close for bare in self.bare), self.stock.close, self.sealed.close):
            stack.callback(close)
        self.threads = stack.enter_context(ThreadPoolExecutor(max(WORKERS)))

    def split(self, n_workers: int, move: Callable[[int, slice], object]) -> None:
        """``move(worker, part)`` for every worker's part of the batch, at once."""
        n_each = len(self.keys) // n_workers
        parts = [slice(n * n_each, (n + 1) * n_each) for n in range(n_workers)]
        if n_workers == 1:
            move(0, parts[0])
        else:
            list(self.threads.map(move, range(n_workers), parts))

    def read_backend(self, backend: StorageBackend, _: int, part: slice) -> None:
        """``batch_get`` of a part."""
        keys = self.keys[part]
        assert backend.batch_get(keys, self.pages[part]) == len(keys)

    def write_backend(self, backend: StorageBackend, _: int, part: slice) -> None:
        """``batch_set`` of a part."""
        keys = self.keys[part]
        assert backend.batch_set(keys, self.pages[part]) == len(keys)

    def moves(self) -> dict[str, Callable[[int, slice], object]]:
        """What each row does with a part of the batch."""
        keys, whole = self.keys, self.whole
        return {
            "write, bare socket": lambda n, p: self.bare[n].write(keys[p], whole[p]),
            "write, hicache": partial(self.write_backend, self.plain),
            "write, hicache sealed": partial(self.write_backend, self.sealed),
            "write, redis-py set": lambda _, p: self.stock.set(keys[p], whole[p]),
            "read, bare socket": lambda n, p: self.bare[n].read(keys[p], whole[p]),
            "read, hicache": partial(self.read_backend, self.plain),
            "read, hicache sealed": partial(self.read_backend, self.sealed),
            "read, redis-py get": lambda _, p: self.stock.get_into(keys[p], whole[p]),
            "read, redis-py mget": lambda _, p: self.stock.mget_into(keys[p], whole[p]),
            "read, redis-py get, dropped": lambda _, p: self.stock.get(keys[p]),
        }

    def single_reads(self) -> dict[str, Callable[[], object]]:
        """One page, by each client."""
        key, part = self.keys[:1], slice(0, 1)
        return {
            "hit, bare socket": lambda: self.bare[0].read(key, self.whole[:1]),
            "hit, hicache": partial(self.read_backend, self.plain, 0, part),
            "hit, hicache sealed": partial(self.read_backend, self.sealed, 0, part),
            "hit, redis-py get": lambda: self.stock.get(key),
        }


_CONTEXT = BackendContext(NAMESPACE)
_TARGETS = {
    "write, hicache sealed": ">= 0.85 x bare from 1 MiB on",
    "read, hicache sealed": ">= 0.85 x bare from 1 MiB on",
    "read, redis-py get": "<= 0.4 x read, hicache sealed at 4 and 8 MiB",
    "hit, hicache": "<= 1.3 x bare (about 25 us more, whatever the size)",
}
_SEALED_READ = "read, hicache sealed"
_BASELINES = {
    "read, redis-py get": _SEALED_READ,
    "read, redis-py mget": _SEALED_READ,
    "read, redis-py get, dropped": _SEALED_READ,
}


def _in_turns(
    calls: Mapping[str, Callable[[], object]], repeat: int, number: int = 1
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds and CPU seconds of each call, one sample of each after the other."""
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            wall, cpu = measure(call, repeat=1, number=number)
            samples[name][0].extend(wall)
            samples[name][1].extend(cpu)
    return samples


def rows(quick: bool) -> Iterator[Row]:
    """Throughput of batches by 1 and 4 workers, then the latency of one page."""
    n_pages, repeat = (16, 3) if quick else (N_PAGES, 7)
    limits = ("--maxmemory", "6gb", "--maxmemory-policy", "allkeys-lru")
    for nbytes in SIZES:
        with running(*limits) as server, ExitStack() as stack:
            bench = Bench(server, nbytes, n_pages, stack)
            size = f"{nbytes >> 20} MiB" if nbytes >> 20 else f"{nbytes >> 10} KiB"
            for n_workers in WORKERS:
                title = f"Redis, {n_pages} pages of {size}, {n_workers} worker(s)"
                yield from _throughput(bench, title, n_workers, repeat)
            yield from _latency(bench, f"Redis, one page of {size}", repeat)


def _throughput(bench: Bench, title: str, n_workers: int, repeat: int) -> Iterator[Row]:
    calls = {name: partial(bench.split, n_workers, move) for name, move in bench.moves().items()}
    n_mb = sum(page.nbytes for page in bench.whole) / 1e6
    for name, (wall, cpu) in _in_turns(calls, repeat).items():
        base = _BASELINES.get(name, f"{name.partition(',')[0]}, bare socket")
        yield Row(
            table=title,
            name=name,
            unit="MB/s",
            samples=[n_mb / s for s in wall],
            cpu_samples=[n_mb / max(s, 1e-6) for s in cpu],
            baseline=None if base == name else base,
            target=_TARGETS.get(name),
        )


def _latency(bench: Bench, title: str, repeat: int) -> Iterator[Row]:
    for name, (wall, cpu) in _in_turns(bench.single_reads(), 2 * repeat, number=100).items():
        yield Row(
            table=title,
            name=name,
            unit="us",
            samples=[s * 1e6 for s in wall],
            cpu_samples=[s * 1e6 for s in cpu],
            baseline=None if name == "hit, bare socket" else "hit, bare socket",
            target=_TARGETS.get(name),
        )
