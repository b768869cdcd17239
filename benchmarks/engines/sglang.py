"""SGLang's controller on its own file store and on ours: 128 pages of 1 MiB, and absent keys.

Run by the Python of SGLang's environment, from this repository; ``TMPDIR`` chooses the disk::

    TMPDIR=/a/disk python -m benchmarks.engines.sglang [--quick]

Both are called by the functions of SGLang's controller that move pages: the generic ones for its
file store, which has no others, and those of interface v1 for ours. Ours seals each page with a
checksum and checks it at each read; SGLang's does neither.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt import runtime_context
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.server_args import ServerArgs

from benchmarks.harness import InTurn, Row, run_alone
from hicache_core.integrations.foreign.answer import Answer
from hicache_core.integrations.sglang import HiCacheBackend
from hicache_core.types import Page

N_PAGES = 128
PAGE_SIZE, LAYERS, HEADS, DIM = 64, 8, 4, 128  # of bfloat16: 1 MiB a page
OURS, OURS_GENERIC, THEIRS = "ours, file, v1", "ours, file, generic path", "HiCacheFile"
ALONE = "ours on a store that answers at once"
WHAT = ("128 absent keys", "set", "set again", "get")
TARGETS = {
    (OURS, "128 absent keys"): "at most 1 ms",
    (OURS, "set"): "at most 0.2 × HiCacheFile",
    (OURS, "get"): "at most 0.2 × HiCacheFile",
    (ALONE, "set"): "at most 0.05 × ours, file, v1",
    (ALONE, "get"): "at most 0.05 × ours, file, v1",
}

Calls = dict[str, Callable[[Sequence[str]], None]]


class AnsweringStore:
    """An emulation of a store that moves nothing, so that what remains is the adapter."""

    def exists(self, keys: Sequence[str]) -> Answer:
        """Nothing is there, so that every page is written."""
        return Answer([False] * len(keys))

    def read(self, keys: Sequence[str], _pages: Sequence[Page]) -> Answer:
        """Every page came."""
        return Answer([True] * len(keys))

    write = read


def host_pool(layout: str) -> Any:
    """SGLang's host pool with room for the pages that are stored and those that are read."""
    device = MHATokenToKVPool(
        size=PAGE_SIZE,
        page_size=PAGE_SIZE,
        dtype=torch.bfloat16,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    with host_memory_budget_scope(1 << 40):
        pool = MHATokenToKVPoolHost(
            device._mha_buffer_info(),
            0.0,
            0,
            PAGE_SIZE,
            layout,
            pin_memory=False,
            device_capacity_tokens=PAGE_SIZE,
            start_layer=0,
            end_layer=LAYERS,
            host_token_capacity=2 * N_PAGES * PAGE_SIZE,
        )
    pool.kv_buffer.view(torch.uint8).random_(0, 255)
    return pool


def config(**extra: object) -> Any:
    """What SGLang tells a storage backend, with our settings if there are some."""
    return HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, True, "m", extra_config=extra)


def ours(pool: Any, folder: Path, *, interface_v1: bool) -> Any:
    """Our backend on the file store."""
    settings = {"path": str(folder), "max_nbytes": 6 * N_PAGES << 20}
    backend = HiCacheBackend(
        config(interface_v1=interface_v1, backend="file", backend_config=settings), {}
    )
    backend.register_mem_pool_host(pool)
    return backend


def alone(pool: Any, folder: Path) -> Any:
    """Our backend on a store that answers at once."""
    backend = ours(pool, folder, interface_v1=True)
    backend._store._store.close()
    backend._store._store = AnsweringStore()
    return backend


def theirs(pool: Any, folder: Path) -> Any:
    """SGLang's own file store."""
    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(folder)
    store = HiCacheFile(config(), str(folder))
    store.register_mem_pool_host(pool)
    return store


def calls_of(backend: Any, pool: Any, *, interface_v1: bool) -> Calls:
    """The controller's functions around a backend."""
    controller = SimpleNamespace(
        storage_backend=backend, storage_host_pool=pool, mem_pool_host=pool, page_size=PAGE_SIZE
    )
    operation = SimpleNamespace(request_id="a request", is_terminated=lambda: False)
    source, target = torch.arange(2 * N_PAGES * PAGE_SIZE).chunk(2)
    names = ("_page_set_zero_copy", "_page_get_zero_copy")
    if not interface_v1:
        names = ("_generic_page_set", "_generic_page_get")
    page_set, page_get = (getattr(HiCacheController, name) for name in names)

    def absent(keys: Sequence[str]) -> None:
        assert backend.batch_exists(keys) == 0

    def store(keys: Sequence[str]) -> None:
        assert page_set(controller, keys, source) is True

    def load(keys: Sequence[str]) -> None:
        assert page_get(controller, operation, keys, target) == N_PAGES

    return dict(zip(WHAT, (absent, store, store, load), strict=True))


def rows(quick: bool) -> Iterator[Row]:
    """Each path in turn, a few times, for a layout of few segments a page and one of many."""
    logging.disable(logging.WARNING)
    runtime_context.publish(ServerArgs(model_path="dummy", device="cpu"), role="test")
    ranks = {"tp_rank": 0, "pp_rank": 0, "attn_tp_rank": 0, "attn_cp_rank": 0}
    runtime_context.get_parallel().override_permanently(**ranks)
    for layout in ("page_first", "layer_first"):
        with tempfile.TemporaryDirectory() as folder:
            yield from _rows_of(layout, Path(folder), 4 if quick else 10)


def _rows_of(layout: str, folder: Path, n_times: int) -> Iterator[Row]:
    pool = host_pool(layout)
    backends = {
        THEIRS: theirs(pool, folder / "theirs"),
        OURS_GENERIC: ours(pool, folder / "generic", interface_v1=False),
        OURS: ours(pool, folder / "v1", interface_v1=True),
        ALONE: alone(pool, folder / "alone"),
    }
    samples = InTurn()
    for n, turn in itertools.product(range(n_times), range(len(backends))):
        name, backend = list(backends.items())[(n + turn) % len(backends)]  # each is first in turn
        keys = [hashlib.sha256(os.urandom(32)).hexdigest() for _ in range(N_PAGES)]
        calls = calls_of(backend, pool, interface_v1=name in (OURS, ALONE))
        for what, call in calls.items():
            samples.call(name, what, partial(call, keys), counts=n > 0)
        if name == THEIRS:
            shutil.rmtree(folder / "theirs")
            (folder / "theirs").mkdir()
    for name in (OURS_GENERIC, OURS):
        backends[name].close()
    for what in WHAT:
        for name in backends:
            table = f"SGLang's controller, {layout}, 128 pages of 1 MiB: {what}"
            yield samples.row(table, name, what, THEIRS, TARGETS.get((name, what)))


if __name__ == "__main__":
    run_alone("engines.sglang")
