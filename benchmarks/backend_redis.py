"""The Redis backend beside a bare socket and beside redis-py, on one Valkey server.

Every row moves the same pages of one batch over loopback TCP, split among the workers.
"""

from __future__ import annotations

import queue
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import redis
from hicache_redis import RedisBackend, RedisConfig

from benchmarks.contest import (
    N_PAGES,
    NAMESPACE,
    SIZES,
    WORKERS,
    Contender,
    Contest,
    backend_contender,
    gap_rows,
    keys_of,
)
from benchmarks.harness import Row
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.types import BackendContext
from tests.servers.valkey import Valkey, running

PREFIX = "hicache:"
BARE = "bare socket"
SEALED = "hicache sealed"


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

    def __init__(self, server: Valkey, size: str, n_pages: int, stack: ExitStack) -> None:
        """Connects everything; ``stack`` disconnects it."""
        self.size, self.nbytes = size, SIZES[size]
        self.keys = keys_of("redis", n_pages)
        self.whole = [memoryview(bytearray(self.nbytes)) for _ in range(n_pages)]
        for n, page in enumerate(self.whole):
            page[HEADER_NBYTES:] = n.to_bytes(1) * (self.nbytes - HEADER_NBYTES)
        self.bare: queue.SimpleQueue[BareClient] = queue.SimpleQueue()
        for _ in range(max(WORKERS)):
            client = BareClient(server.port)
            self.bare.put(client)
            stack.callback(client.close)
        self.stock = StockClient(server.port)
        stack.callback(self.stock.close)
        config = RedisConfig.model_validate({"url": server.url})
        self.plain = RedisBackend(config, BackendContext(NAMESPACE))
        self.sealed = SealedBackend(self.plain)
        self.sealed.open()
        stack.callback(self.sealed.close)

    def contest(self) -> Contest:
        """Everybody, on the whole batch."""
        pages = [(page[:HEADER_NBYTES], page[HEADER_NBYTES:]) for page in self.whole]
        ours = partial(backend_contender, keys=lambda: self.keys, pages=pages)
        stock = self.stock
        everyone = [
            Contender(BARE, self._by_socket(BareClient.read), self._by_socket(BareClient.write)),
            ours("hicache", self.plain, hit_target="≤ 1.3 × bare (about 25 us more)"),
            ours(SEALED, self.sealed, target="≥ 0.85 × bare from 1 MiB on"),
            Contender(
                "redis-py get, set",
                self._of_part(stock.get_into),
                self._of_part(stock.set),
                baseline=SEALED,
                target="reads ≤ 0.4 × hicache sealed at 4 and 8 MiB",
            ),
            Contender("redis-py mget", self._of_part(stock.mget_into), baseline=SEALED),
            Contender(
                "redis-py get, dropped",
                self._of_part(lambda keys, _: stock.get(keys)),
                baseline=SEALED,
            ),
        ]
        return Contest("Redis", self.size, self.nbytes, len(self.keys), everyone, BARE)

    def _of_part(
        self, move: Callable[[Sequence[str], Sequence[memoryview]], object]
    ) -> Callable[[Sequence[int]], None]:
        def work(part: Sequence[int]) -> None:
            move([self.keys[n] for n in part], [self.whole[n] for n in part])

        return work

    def _by_socket(
        self, move: Callable[[BareClient, Sequence[str], Sequence[memoryview]], object]
    ) -> Callable[[Sequence[int]], None]:
        """A socket serves one worker at a time; there is one for each of them."""

        def work(part: Sequence[int]) -> None:
            client = self.bare.get()
            self._of_part(partial(move, client))(part)
            self.bare.put(client)

        return work


def rows(quick: bool) -> Iterator[Row]:
    """Throughput of batches by 1 and 4 workers, the latency of one page, and the price of gaps."""
    n_pages, n_turns = (16, 3) if quick else (N_PAGES, 7)
    limits = ("--maxmemory", "6gb", "--maxmemory-policy", "allkeys-lru")
    for size in SIZES:
        with running(*limits) as server, ExitStack() as stack:
            contest = Bench(server, size, n_pages, stack).contest()
            for n_workers in WORKERS:
                yield from contest.throughput(n_workers, n_turns)
            yield from contest.latency(2 * n_turns, number=100)
    with running(*limits) as server, ExitStack() as stack:
        bench = Bench(server, "256 KiB", N_PAGES, stack)
        yield from gap_rows("Redis", bench.plain, [(page,) for page in bench.whole], n_turns)
