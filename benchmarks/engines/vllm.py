"""Secondary tiers of vLLM's offloading side by side: ours on the file backend, and vLLM's ``fs``.

Run by the Python of vLLM's environment, from this repository; ``TMPDIR`` chooses the disk::

    TMPDIR=/a/disk python -m benchmarks.engines.vllm [--quick]

Ours seals each row with a checksum and checks it at each load; ``fs`` does neither. ``fs`` writes
and reads past the page cache where the disk allows it; ours goes through it.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingKVEventsConfig,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

from benchmarks.harness import InTurn, Row, run_alone
from hicache_core.integrations.foreign.answer import Answer
from hicache_core.integrations.foreign.opening import open_store
from hicache_core.integrations.vllm.keys import offload_keys

N_ROWS = 128
NBYTES = 1 << 20
STEP = ScheduleEndContext(new_req_ids=(), preempted_req_ids=())

OURS, STORE, FS = "ours, file", "its store without the tier", "fs"
WHAT = ("128 absent keys", "set", "128 present keys", "get")
TARGETS = {
    (OURS, "set"): "at most 0.8 × fs",
    (OURS, "get"): "at most 0.8 × fs",
}

Calls = dict[str, Callable[[Sequence[Any]], None]]


class Memory:
    """vLLM's host memory: what is stored in its first half, what is loaded in the second."""

    def __init__(self) -> None:
        aligned = np.empty(2 * N_ROWS * NBYTES + 4096, np.int8)  # as fs needs it
        start = -aligned.ctypes.data % 4096
        self.rows = aligned[start : start + 2 * N_ROWS * NBYTES].reshape(2 * N_ROWS, NBYTES)
        self.source, self.target = self.rows[:N_ROWS], self.rows[N_ROWS:]
        self.source[:] = np.random.default_rng(0).integers(-128, 128, self.source.shape, np.int8)


def tier_of(settings: dict[str, Any], memory: Memory) -> Any:
    """The tier that vLLM makes of an entry of ``secondary_tiers``."""
    parallel = OffloadingParallelConfig(
        rank=0,
        world_size=1,
        tp_size=1,
        pp_size=1,
        pcp_size=1,
        dcp_size=1,
        data_parallel_index=0,
        data_parallel_size=1,
        data_parallel_rank_local=None,
        is_parallelism_agnostic=False,
    )
    config = OffloadingConfig(
        groups=(OffloadingGroupConfig(tokens_per_block=16, layer_names=("0",), group_id=0),),
        worker_kv_bytes_per_block=NBYTES,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="a benchmark",
        model=OffloadingModelConfig(name="a/model", dtype="bfloat16"),
        cache=OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=parallel,
        kv_cache_layout="LBHNC",
    )
    spec = SimpleNamespace(
        config=config,
        blocks_per_chunk=1,
        replicated_layout=False,
        kv_events_config=OffloadingKVEventsConfig(False, False),
    )
    return SecondaryTierFactory.create_secondary_tier(settings, memory.rows.data, spec)


def tier_calls(tier: Any) -> Calls:
    """Calls of a tier, each of which returns when vLLM would have the answer."""
    job_ids, requests = itertools.count(), itertools.count()

    def lookup(expected: LookupResult, keys: Sequence[Any]) -> None:
        request = ReqContext(req_id=str(next(requests)))
        tier.on_new_request(request)
        found = [tier.lookup(key, request) for key in keys]
        while LookupResult.RETRY in found:
            tier.on_schedule_end(STEP)
            time.sleep(0.0002)  # vLLM asks again in its next step
            found = [tier.lookup(key, request) for key in keys]
        tier.on_request_finished(request)
        assert set(found) == {expected}

    def moved(first_row: int, submit: Callable[[TransferJob], None], keys: Sequence[Any]) -> None:
        rows = np.arange(first_row, first_row + N_ROWS, dtype=np.int32)
        is_load = first_row > 0
        submit(TransferJob(next(job_ids), keys, rows, is_load, ReqContext(req_id="a request")))
        tier.drain_jobs()
        (result,) = tier.get_finished_jobs()
        assert result.success

    calls = (
        partial(lookup, LookupResult.MISS),
        partial(moved, 0, tier.submit_store),
        partial(lookup, LookupResult.HIT),
        partial(moved, N_ROWS, tier.submit_load),
    )
    return dict(zip(WHAT, calls, strict=True))


def store_calls(store: Any, memory: Memory) -> Calls:
    """The same calls on the store below our tier, with pages made beforehand."""
    namespace = "0123456789abcdef"
    source, target = (
        [(row.view(np.uint8).data,) for row in half] for half in (memory.source, memory.target)
    )

    def answered(n_expected: int, submit: Callable[..., None], *arguments: object) -> None:
        event, answers = threading.Event(), list[Answer]()

        def on_done(answer: Answer) -> None:
            answers.append(answer)
            event.set()

        submit(*arguments, on_done)
        event.wait(60)
        assert sum(answers[0].mask) == n_expected

    def lookup(n_expected: int, keys: Sequence[Any]) -> None:
        answered(n_expected, store.submit_exists, offload_keys(namespace, keys))

    def moved(submit: Callable[..., None], pages: Sequence[Any], keys: Sequence[Any]) -> None:
        answered(N_ROWS, submit, offload_keys(namespace, keys), pages)

    calls = (
        partial(lookup, 0),
        partial(moved, store.submit_write, source),
        partial(lookup, N_ROWS),
        partial(moved, store.submit_read, target),
    )
    return dict(zip(WHAT, calls, strict=True))


def rows(quick: bool) -> Iterator[Row]:
    """Set, get and lookups of every tier in turn, a few times."""
    logging.disable(logging.INFO)
    memory = Memory()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        max_nbytes = 4 * N_ROWS * NBYTES
        ours = {
            "type": "HiCacheTier",
            "module_path": "hicache_core.integrations.vllm",
            "backend": "file",
            "backend_config": {"path": str(folder / "ours"), "max_nbytes": max_nbytes},
        }
        theirs = {"type": "fs", "root_dir": str(folder / "fs")}
        tiers = {OURS: tier_of(ours, memory), FS: tier_of(theirs, memory)}
        store = open_store("file", {"path": str(folder / "store"), "max_nbytes": max_nbytes})
        calls = {name: tier_calls(tier) for name, tier in tiers.items()}
        calls[STORE] = store_calls(store, memory)
        samples = InTurn()
        for n, name in itertools.product(range(4 if quick else 12), calls):
            keys = [make_offload_key(os.urandom(32), 0) for _ in range(N_ROWS)]
            for what, call in calls[name].items():
                samples.call(name, what, partial(call, keys), counts=n > 0)
            assert np.array_equal(memory.source, memory.target)
            memory.target[:] = 0
            for file in (folder / "fs").rglob("*.bin"):
                file.unlink()
        for tier in tiers.values():
            tier.shutdown()
        store.close()
        shutil.rmtree(folder / "fs")
    for what in WHAT:
        for name in (FS, STORE, OURS):
            table = f"vLLM's secondary tiers, 128 rows of 1 MiB: {what}"
            yield samples.row(table, name, what, FS, TARGETS.get((name, what)))


if __name__ == "__main__":
    run_alone("engines.vllm")
