"""Our adapter under LMCache's own storage manager: host memory and controllers, no model.

Run by LMCache's Python (``vllm_rules.py``). A rule is a function whose name starts with ``rule_``;
its argument is an empty folder.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lmcache.v1.check.check_mode_test_l2_adapter import run_test_mode
from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.storage_manager import StorageManager

SHAPE = torch.Size([4, 256, 256])
BF16 = MemoryLayoutDesc([SHAPE], [torch.bfloat16])
FP16 = MemoryLayoutDesc([SHAPE], [torch.float16])
NBYTES = SHAPE.numel() * 2
LIMIT_S = 20.0


def spec(folder: Path, *, serde: str = "", **of_lmcache: object) -> dict[str, object]:
    """The JSON of ``--l2-adapter`` for our adapter on the file backend."""
    return {
        "type": "plugin",
        "module_path": "hicache_core.integrations.lmcache",
        "class_name": "HiCacheL2Adapter",
        "adapter_params": {
            "backend": "file",
            "backend_config": {"path": str(folder)},
            "serde": serde,
        },
        **of_lmcache,
    }


@contextlib.contextmanager
def manager(adapter: dict[str, object]) -> Iterator[StorageManager]:
    """LMCache's storage manager with empty host memory and one adapter."""
    arguments = argparse.Namespace(l2_adapter=[json.dumps(adapter)])
    memory = L1MemoryManagerConfig(64 << 20, use_lazy=False, shm_name="")
    made = StorageManager(
        StorageManagerConfig(
            L1ManagerConfig(memory),
            EvictionConfig("LRU"),
            parse_args_to_l2_adapters_config(arguments),
        )
    )
    try:
        yield made
    finally:
        made.close()


def wait_for(what: Any) -> Any:
    """Returns what the call answers, once it is something."""
    until = time.monotonic() + LIMIT_S
    while not (answer := what()):
        assert time.monotonic() < until, "LMCache does not come to an end"
        time.sleep(0.01)
    return answer


def new_keys(n: int, **fields: Any) -> list[ObjectKey]:
    """Keys as LMCache's server makes them for one worker."""
    rank = ObjectKey.ComputeKVRank(1, 0, 1, 0)
    return [ObjectKey(os.urandom(32), "a/model", rank, **fields) for _ in range(n)]


def put(
    to: StorageManager, keys: Sequence[ObjectKey], layout: MemoryLayoutDesc = BF16
) -> list[torch.Tensor]:
    """Writes random chunks as an engine does, and waits until the adapter has stored them."""
    reserved = to.reserve_write(list(keys), layout)
    for buffer in reserved.values():
        buffer.tensor.normal_()
    content = [reserved[key].tensor.clone() for key in keys]
    adapter = to.l2_adapters()[0][1]
    before = adapter.get_usage().total_bytes_used
    to.finish_write(list(keys))
    wait_for(lambda: adapter.get_usage().total_bytes_used >= before + len(keys))
    wait_for(lambda: to.report_status()["store_controller"]["in_flight_task_count"] == 0)
    return content


def get(
    out_of: StorageManager, keys: Sequence[ObjectKey], layout: MemoryLayoutDesc = BF16
) -> list[torch.Tensor | None]:
    """What a lookup of an engine brings into host memory; None for a chunk that is not found."""
    row = GroupedObjectKeys(list(keys), 0, layout)
    handle = out_of.submit_prefetch_task(PrefetchTaskSpec([row], fetching_policy="full"))
    hits = wait_for(lambda: out_of.query_prefetch_status(handle)).hit_cells[0]
    found: list[torch.Tensor | None] = []
    for n, key in enumerate(keys):
        if not hits.test(n):
            found.append(None)
            continue
        with out_of.read_prefetched_results([key]) as objects:
            found.append(objects[0].tensor.clone())
        out_of.finish_read_prefetched([key])
    return found


def same(found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]) -> bool:
    """Whether the chunks are equal, and the same ones missing."""
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


def rule_a_fresh_manager_finds_what_another_stored_also_behind_gaps(folder: Path) -> None:
    keys = new_keys(5)
    with manager(spec(folder)) as first:
        stored = put(first, keys[::2])
    with manager(spec(folder)) as second:
        assert same(get(second, keys), [stored[0], None, stored[1], None, stored[2]])


def rule_a_damaged_chunk_is_missing_and_the_others_are_right(folder: Path) -> None:
    keys = new_keys(3)
    with manager(spec(folder)) as first:
        stored = put(first, keys)
    damaged = stored[1].view(torch.uint8).flatten()[:64].numpy().tobytes()
    for segment in folder.glob("segments/*.seg"):
        segment.write_bytes(segment.read_bytes().replace(damaged, bytes(64)))
    with manager(spec(folder)) as second:
        assert same(get(second, keys), [stored[0], None, stored[2]])
        assert same(put(second, keys[1:2]), get(second, keys[1:2]))


def rule_servers_with_other_dtypes_of_one_size_share_a_store(folder: Path) -> None:
    keys = new_keys(2)
    with manager(spec(folder)) as first:
        in_bf16 = put(first, keys)
    with manager(spec(folder)) as second:
        assert same(get(second, keys, FP16), [None, None])
        in_fp16 = put(second, keys, FP16)
    for layout, stored in ((BF16, in_bf16), (FP16, in_fp16)):
        with manager(spec(folder)) as third:
            assert same(get(third, keys, layout), stored)


def rule_chunks_that_lmcache_quantises_are_found_by_a_fresh_manager(folder: Path) -> None:
    keys = new_keys(2)
    adapter = spec(folder, serde="fp8 e4m3fn") | {"serde": {"type": "fp8"}}
    with manager(adapter) as first:
        stored = put(first, keys)
    expected = [chunk.to(torch.float8_e4m3fn).to(torch.bfloat16) for chunk in stored]
    with manager(adapter) as second:
        assert same(get(second, keys), expected)


def rule_a_salt_is_apart_and_its_quota_deletes_from_the_store(folder: Path) -> None:
    adapter = spec(folder, eviction={"eviction_policy": "IsolatedLRU"})
    salted, plain = new_keys(4, cache_salt="a tenant"), new_keys(1)
    with manager(adapter) as first:
        for salt in ("", "a tenant"):
            first.quota_manager.set_quota(salt, 100 * NBYTES)
        put(first, plain)
        put(first, salted)
        store = first.l2_adapters()[0][1]
        assert dict(store.get_usage().bytes_by_cache_salt) == {"": NBYTES, "a tenant": 4 * NBYTES}
        first.quota_manager.set_quota("a tenant", 3 * NBYTES)
        wait_for(lambda: store.get_usage().bytes_by_cache_salt["a tenant"] <= 3 * NBYTES)
    left = store.get_usage().bytes_by_cache_salt.get("a tenant", 0) // NBYTES
    with manager(adapter) as second:
        assert sum(chunk is not None for chunk in get(second, salted)) == left
        assert get(second, plain) != [None]
        unsalted = [ObjectKey(key.chunk_hash, key.model_name, key.kv_rank) for key in salted]
        assert get(second, unsalted) == [None] * 4


def rule_wrong_params_end_the_start_with_one_sentence(folder: Path) -> None:
    params: dict[str, object] = {"backend": "file", "backend_config": {"pth": str(folder)}}
    said = "it started"
    try:
        with manager(spec(folder) | {"adapter_params": params}):
            pass
    except ValueError as refused:
        said = str(refused)
    assert "pth: unknown setting" in said, said
    assert "\n" not in said


def rule_lmcaches_own_check_passes(folder: Path) -> None:
    said = io.StringIO()
    options = {"l2_adapter": [json.dumps(spec(folder))], "num_keys": 8, "kv_dtype": "bfloat16"}
    with contextlib.redirect_stdout(said):
        asyncio.run(run_test_mode("a/model", obj_size=NBYTES // 2, **options))
    found = [line.strip() for line in said.getvalue().splitlines() if "Validation" in line]
    assert found == [
        "Validation: 8/8 correctly absent",
        "Validation: 8/8 found",
        "Validation (loaded): 8/8",
        "Validation (content): 8/8",
    ], said.getvalue()
