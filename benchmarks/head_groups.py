"""What it costs to store pages by groups of heads, against whole pages; on the memory backend."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.harness import Row, measure
from hicache_core.kv.keys import object_keys, page_digests, storage_namespace
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.heads.groups import HeadGroupBackend
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import SealedBackend
from hicache_core.types import BackendContext

PAGE_SIZE = 64
MODEL = KVSpec.mha(num_layers=32, num_heads=8, head_dim=128, dtype="bfloat16", fingerprint="bench")
RANK = MODEL.shard(heads=(0, 4))
"""One of two ranks of an 8B model with 8 KV heads: pages of 4 MiB."""


def rows(quick: bool) -> Iterator[Row]:
    """GB/s of writes and reads, sealed, for each layout: whole, in groups of 2 heads and of 1."""
    n_pages, repeat = (4, 5) if quick else (16, 11)
    for layout in LAYOUTS:
        pool = HostPool(RANK, PAGE_SIZE, n_pages, LAYOUTS[layout])
        ids = pool.allocator.allocate(n_pages)
        namespace = storage_namespace(RANK.identity(), PAGE_SIZE, layout)
        keys = object_keys(namespace, page_digests(bytes(4 * PAGE_SIZE * n_pages), PAGE_SIZE))
        pages = pool.pages(ids)
        nbytes = n_pages * pool.object_nbytes
        table = f"Head groups, pages of 4 MiB of 4 heads, {layout}"
        for action in ("write", "read"):
            whole = f"{action}, whole pages"
            for group, name in (
                (4, whole),
                (2, f"{action}, objects of 2 heads"),
                (1, f"{action}, objects of 1 head"),
            ):
                backend = _backend(layout, group)
                backend.open()
                backend.batch_set(keys, pages)
                move = backend.batch_set if action == "write" else backend.batch_get
                call = partial(move, keys, pages)
                wall, cpu = measure(call, repeat=repeat)
                backend.close()
                yield Row(
                    table,
                    name,
                    "GB/s",
                    [nbytes / sample / 1e9 for sample in wall],
                    [nbytes / sample / 1e9 for sample in cpu],
                    baseline=whole,
                )
        pool.close()


def _backend(layout: str, group: int) -> StorageBackend:
    sealed = SealedBackend(MemoryBackend(MemoryConfig(), BackendContext(namespace="0" * 16)))
    if group == 4:
        return sealed
    return HeadGroupBackend(sealed, RANK, PAGE_SIZE, layout, group=group, n_slots=1)
