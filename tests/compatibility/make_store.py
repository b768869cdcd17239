"""Writes the small stores that a later version has to serve: run it with the version to keep.

    python -m tests.compatibility.make_store file tests/compatibility/stores/file-0.1.0.tar.xz
    python -m tests.compatibility.make_store redis redis-0.1.0.json.xz '{"url": "redis://…"}'

It uses public names only, so the same script ran with the old version and runs with this one. Of a
server it keeps the objects by name, which have to be there alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import redis
import torch
from botocore.config import Config

from hicache_core import DevicePool, HiCache, HiCacheConfig, KVSpec, Namespace

PAGE_SIZE = 4
SPEC = KVSpec.mha(
    num_layers=2, num_heads=2, head_dim=2, dtype="float32", fingerprint="a-store-made-before"
)
LATENT = KVSpec.mla(
    num_layers=2, kv_lora_rank=6, rope_dim=2, dtype="bfloat16", fingerprint="a-store-made-before"
)
REQUESTS: list[tuple[list[int], Namespace]] = [
    (list(range(33)), Namespace()),
    ([*range(16), *range(100, 124)], Namespace()),  # shares four pages with the first
    (list(range(33)), Namespace(cache_salt="tenant")),
    (list(range(20)), Namespace(extra_key="key", lora_id="adapter")),
    (list(range(20)), Namespace(variant="weights")),
    ([2**32 - 1 - n for n in range(12)], Namespace()),
]
IO_BACKENDS = {"page_first": "kernel", "layer_first": "direct", "page_first_direct": "direct"}
"""Each host layout, with an io backend that it works with."""

STORES: dict[str, dict[str, Any]] = {
    "file": {"path": "kv", "max_nbytes": "4MiB", "io_threads": 1},
    "hf3fs": {
        "file_path_prefix": "kv/3fs",
        "file_size": "1MiB",
        "mode": "posix",
        "numjobs": 1,
    },
}
"""The settings of each store that is a folder; paths are inside the one that is kept."""


def worlds() -> list[tuple[KVSpec, str]]:
    """Each spec and layout whose pages a store holds."""
    return [(SPEC, layout) for layout in IO_BACKENDS] + [(LATENT, "page_first")]


def n_pages(ids: list[int]) -> int:
    """Whole pages of a prompt."""
    return len(ids) // PAGE_SIZE


def row_bytes(
    ids: list[int], namespace: Namespace, page: int, component: int, layer: int, nbytes: int
) -> bytes:
    """What a row of a page must hold: a digest of its whole prefix, its namespace and its place."""
    salt = (namespace.extra_key, namespace.cache_salt, namespace.lora_id, namespace.variant)
    text = f"{ids[: (page + 1) * PAGE_SIZE]} {salt} {component} {layer}"
    return hashlib.shake_256(text.encode()).digest(nbytes)


def settings_in(folder: Path, backend: str) -> dict[str, Any]:
    """The settings of a store that is a folder, with its paths inside ``folder``."""
    paths = ("path", "file_path_prefix")
    return {
        name: str(folder / value) if name in paths else value
        for name, value in STORES[backend].items()
    }


@contextmanager
def opened(
    backend: str, settings: dict[str, Any], spec: KVSpec, layout: str
) -> Iterator[tuple[HiCache, DevicePool]]:
    """A cache over a store."""
    config = HiCacheConfig(
        page_size=PAGE_SIZE,
        hicache_ratio=2.0,
        hicache_mem_layout=layout,
        hicache_io_backend=IO_BACKENDS[layout],
        hicache_storage_backend=backend,
        hicache_storage_backend_extra_config={"prefetch_threshold": PAGE_SIZE} | settings,
        hicache_storage_prefetch_policy="wait_complete",
    )
    pool = DevicePool(spec, PAGE_SIZE, 64)
    with HiCache(config, spec, pool) as cache:
        yield cache, pool
        cache.flush(30.0)


def rows(pool: DevicePool, page_id: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Component, layer and the bytes of a device page."""
    for component, layers in enumerate(pool.buffers):
        for layer, buffer in enumerate(layers):
            yield component, layer, buffer[page_id].view(torch.uint8)


def store_prompt(cache: HiCache, pool: DevicePool, ids: list[int], namespace: Namespace) -> None:
    """Computes the pages of a prompt that the cache lacks, and stores them."""
    match = cache.match_prefix(ids, namespace)
    cache.lock(match.node)
    cached = cache.load_back(match).device_pages
    pages = cached + cache.allocate(n_pages(ids) - len(cached))
    for page in range(len(cached), len(pages)):
        for component, layer, row in rows(pool, pages[page]):
            content = row_bytes(ids, namespace, page, component, layer, row.numel())
            row.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8).view_as(row))
    cache.free(cache.insert(ids, pages, namespace).duplicates)
    cache.unlock(match.node)


def store_all(backend: str, settings: dict[str, Any]) -> None:
    """Stores the pages of all requests, in every world."""
    for spec, layout in worlds():
        with opened(backend, settings, spec, layout) as (cache, pool):
            for ids, namespace in REQUESTS:
                store_prompt(cache, pool, ids, namespace)


def objects_of(backend: str, settings: dict[str, Any]) -> dict[str, bytes]:
    """Every object of a server, by its name there."""
    if backend == "redis":
        with redis.Redis.from_url(settings["url"]) as client:
            return {key.decode(): client.get(key) for key in sorted(client.scan_iter())}
    bucket = s3_bucket(settings)
    return {one.key: one.get()["Body"].read() for one in bucket.objects.all()}


def put_objects(backend: str, settings: dict[str, Any], objects: dict[str, bytes]) -> None:
    """Puts the objects back into an empty server."""
    if backend == "redis":
        with redis.Redis.from_url(settings["url"]) as client:
            client.mset(objects)
        return
    bucket = s3_bucket(settings)
    for name, content in objects.items():
        bucket.put_object(Key=name, Body=content)


def s3_bucket(settings: dict[str, Any]) -> Any:
    """The bucket of the settings, through a plain client."""
    session = boto3.Session(settings["access_key_id"], settings["secret_access_key"])
    plain = Config(
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    where = {"endpoint_url": settings["endpoint_url"], "region_name": "us-east-1"}
    return session.resource("s3", config=plain, **where).Bucket(settings["bucket"])


def main(backend: str, archive: str, settings: str = "") -> None:
    """Makes a store and packs it."""
    if settings:
        store_all(backend, json.loads(settings))
        objects = objects_of(backend, json.loads(settings))
        text = {name: base64.b64encode(content).decode() for name, content in objects.items()}
        Path(archive).write_bytes(lzma.compress(json.dumps(text, indent=0).encode()))
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kv").mkdir()
        store_all(backend, settings_in(Path(folder), backend))
        with tarfile.open(archive, "w:xz") as tar:
            tar.add(Path(folder) / "kv", "kv")


if __name__ == "__main__":
    main(*sys.argv[1:])
