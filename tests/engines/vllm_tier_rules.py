"""HiCacheTier under vLLM's own TieringOffloadingManager, with real rows in shared memory.

Only the copies between a GPU and these rows are missing: the rules write and read the rows.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    TieringOffloadingManager,
)

from hicache_core.errors import HiCacheError

ROW_NBYTES = 8192
PAYLOAD_NBYTES = 6000
N_ROWS = 16
PENDING = (LookupResult.RETRY, LookupResult.HIT_PENDING)
STEP = ScheduleEndContext(new_req_ids=(), preempted_req_ids=())


def keys_of(*numbers: int, group: int = 0, hash_nbytes: int = 32) -> list[Any]:
    """Keys of chunks."""
    return [make_offload_key(bytes([n]) * hash_nbytes, group) for n in numbers]


def offloading_spec(with_events: bool = False) -> Any:
    """What vLLM says of a small model: one worker, one group, 6,000 bytes a block."""
    config = OffloadingConfig(
        groups=(OffloadingGroupConfig(tokens_per_block=16, layer_names=("0", "1"), group_id=0),),
        worker_kv_bytes_per_block=PAYLOAD_NBYTES,
        enable_kv_cache_events=with_events,
        extra_config={},
        engine_id="an engine",
        model=OffloadingModelConfig(name="a/model", dtype="bfloat16"),
        cache=OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=OffloadingParallelConfig(
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
        ),
        kv_cache_layout="LBHNC",
    )
    return SimpleNamespace(
        config=config,
        replicated_layout=False,
        kv_events_config=OffloadingKVEventsConfig(with_events, False),
    )


class Engine:
    """The scheduler's half of an engine: vLLM's manager, host memory, and our tier."""

    def __init__(self, settings: dict[str, Any], with_events: bool = False) -> None:
        region = SharedOffloadRegion(
            engine_id=f"hicache-test-{uuid.uuid4()}",
            num_chunks=N_ROWS,
            rank=None,
            kv_bytes_per_chunk=ROW_NBYTES,
            cpu_page_size=PAYLOAD_NBYTES,
        )
        self.path = Path(region.mmap_path)
        primary = CPUPrimaryTierOffloadingManager(num_chunks=N_ROWS, mmap_region=region)
        self.rows = np.asarray(primary.get_kv_memoryview())
        tier = {"type": "HiCacheTier", "module_path": "hicache_core.integrations.vllm", **settings}
        self.tier: Any = SecondaryTierFactory.create_secondary_tier(
            tier, primary.get_kv_memoryview(), offloading_spec(with_events)
        )
        self.manager: Any = TieringOffloadingManager(primary, [self.tier])
        self._n_requests = 0

    def request(self) -> ReqContext:
        """A new request."""
        self._n_requests += 1
        context = ReqContext(req_id=f"request-{self._n_requests}")
        self.manager.on_new_request(context)
        return context

    def settle(self, seconds: float = 20.0) -> None:
        """Steps until no transfer runs."""
        until = time.monotonic() + seconds
        self.manager.on_schedule_end(STEP)
        while self.manager.has_pending_work():
            assert time.monotonic() < until, "a transfer does not end"
            time.sleep(0.001)
            self.manager.on_schedule_end(STEP)

    def store(self, keys: Sequence[Any]) -> None:
        """Fills rows as a GPU's copy would: with the first byte of their key, and other padding."""
        request = self.request()
        prepared = self.manager.prepare_store(keys, request)
        for key, row in zip(prepared.keys_to_store, prepared.store_spec.chunk_ids, strict=True):
            self.rows[row, :PAYLOAD_NBYTES] = np.uint8(key[0]).view(np.int8)
            self.rows[row, PAYLOAD_NBYTES:] = ~np.uint8(key[0]).view(np.int8)
        self.manager.complete_store(prepared.keys_to_store, request)
        self.settle()
        self.manager.on_request_finished(request)

    def look(self, keys: Sequence[Any], request: ReqContext, seconds: float = 20.0) -> list[Any]:
        """What vLLM's scheduler finds in the end, step by step."""
        until = time.monotonic() + seconds
        while True:
            found = [self.manager.lookup(key, request) for key in keys]
            if not any(result in PENDING for result in found):
                return found
            assert time.monotonic() < until, f"still {found}"
            self.manager.on_schedule_end(STEP)
            time.sleep(0.001)

    def hits(self, keys: Sequence[Any]) -> list[bool]:
        """Which keys a new request can use; checks the bytes of those."""
        request = self.request()
        found = [result is LookupResult.HIT for result in self.look(keys, request)]
        here = [key for key, hit in zip(keys, found, strict=True) if hit]
        if here:
            loaded = self.manager.prepare_load(here, request)
            for key, row in zip(here, loaded.chunk_ids, strict=True):
                assert (self.rows[row, :PAYLOAD_NBYTES] == np.uint8(key[0]).view(np.int8)).all()
            self.manager.complete_load(here, request)
        self.manager.on_request_finished(request)
        return found

    def close(self) -> None:
        """As vLLM shuts down."""
        del self.rows
        self.manager.shutdown()
        assert not self.path.exists()


@contextmanager
def engine(folder: Path, with_events: bool = False, **settings: Any) -> Iterator[Engine]:
    """An engine over the file backend in ``folder``."""
    named = {"backend": "file", "backend_config": {"path": str(folder)}} | settings
    running = Engine(named, with_events)
    try:
        yield running
    finally:
        running.close()


def holder_of(folder: Path, key: Any) -> Path:
    """The file that the page of ``key`` is in."""
    for file in folder.rglob("*"):
        if file.is_file() and bytes([key[0]]) * 512 in file.read_bytes():
            return file
    raise AssertionError("the page is in no file")


def damage(folder: Path, key: Any) -> None:
    """Flips one bit in the middle of the stored page of ``key``."""
    file = holder_of(folder, key)
    at = file.read_bytes().find(bytes([key[0]]) * 512) + 256
    with file.open("r+b") as segment:
        segment.seek(at)
        segment.write(bytes([key[0] ^ 1]))


def rule_what_one_engine_stored_another_loads(folder: Path) -> None:
    keys = keys_of(1, 2, 3)
    with engine(folder) as first:
        first.store(keys)
    with engine(folder) as second:
        assert second.hits([*keys, *keys_of(4)]) == [True, True, True, False]


def rule_pages_behind_a_gap_are_found_as_a_sliding_window_needs_them(folder: Path) -> None:
    with engine(folder) as first:
        first.store(keys_of(1, 3))
    with engine(folder) as second:
        assert second.hits(keys_of(1, 2, 3)) == [True, False, True]


def rule_the_first_question_waits_for_the_end_of_the_step(folder: Path) -> None:
    with engine(folder) as running:
        request = running.request()
        (key,) = keys_of(1)
        assert running.manager.lookup(key, request) is LookupResult.RETRY
        assert running.manager.lookup(key, request) is LookupResult.RETRY
        assert running.look([key], request) == [LookupResult.MISS]


def rule_a_damaged_page_is_a_miss_of_that_page_alone(folder: Path) -> None:
    keys = keys_of(1, 2, 3)
    with engine(folder) as first:
        first.store(keys)
    damage(folder, keys[1])
    with engine(folder) as second:
        assert second.hits(keys) == [True, False, True]
        counted = second.tier.get_stats().reduce()
        assert counted["hicache:refused_chunks:('HiCacheTier', 'corrupt')"] == 1
        assert counted["hicache:store_available:('HiCacheTier', 'file')"] == 1
        second.store(keys_of(2))  # as vLLM does once it has computed it again
    with engine(folder) as third:
        assert third.hits(keys) == [True, True, True]


def rule_what_another_engine_stores_later_is_found_by_the_next_request(folder: Path) -> None:
    keys = keys_of(1, 2)
    with engine(folder) as first, engine(folder) as second:
        assert first.hits(keys) == [False, False]
        second.store(keys)
        assert first.hits(keys) == [True, True]


def rule_a_second_group_never_answers_for_the_first(folder: Path) -> None:
    with engine(folder) as first:
        first.store(keys_of(1))
        first.store(keys_of(2, group=1))
    with engine(folder) as second:
        assert second.hits(keys_of(1, 2, group=1)) == [False, True]
        assert second.hits(keys_of(1, 2)) == [True, False]


def rule_keys_that_no_other_process_would_make_are_not_stored(folder: Path) -> None:
    assert "PYTHONHASHSEED" not in os.environ
    keys = keys_of(1, 2, hash_nbytes=16)
    with engine(folder) as first:
        first.store(keys)
        assert not first.manager.has_pending_work()
    os.environ["PYTHONHASHSEED"] = "0"
    try:
        with engine(folder) as second:
            assert second.hits(keys) == [False, False]
            second.store(keys)
        with engine(folder) as third:
            assert third.hits(keys) == [True, True]
    finally:
        del os.environ["PYTHONHASHSEED"]


def rule_a_reset_waits_for_running_transfers_and_keeps_the_store(folder: Path) -> None:
    keys = keys_of(*range(1, 9))
    with engine(folder) as running:
        request = running.request()
        prepared = running.manager.prepare_store(keys, request)
        for key, row in zip(keys, prepared.store_spec.chunk_ids, strict=True):
            running.rows[row, :PAYLOAD_NBYTES] = key[0]
        running.manager.complete_store(keys, request)
        running.manager.reset_cache()
        assert not running.manager.has_pending_work()
        running.rows[:] = 0
        assert running.hits(keys) == [True] * 8


def rule_stored_chunks_are_announced_if_events_are_on(folder: Path) -> None:
    keys = keys_of(1, 2)
    with engine(folder, with_events=True, enable_kv_events=True, locality="REMOTE") as running:
        running.store(keys)
        (event,) = running.tier.take_events()
        assert (event.keys, event.removed, event.locality.value) == (keys, False, "REMOTE")
        assert list(running.tier.take_events()) == []
    with engine(folder, enable_kv_events=True) as running:
        running.store(keys_of(3))
        assert list(running.tier.take_events()) == []


def rule_a_store_that_has_lost_its_bytes_is_a_miss(folder: Path) -> None:
    with engine(folder) as running:
        running.store(keys_of(1))
        os.truncate(holder_of(folder, keys_of(1)[0]), 0)
        assert running.hits(keys_of(1, 2)) == [True, False]  # the row in host memory is still good
        running.manager.reset_cache()
        assert running.hits(keys_of(1, 2)) == [False, False]


def rule_settings_and_backends_that_do_not_exist_are_refused_in_a_sentence(folder: Path) -> None:
    wrong = [
        ({"backend": "rediss"}, "no backend named 'rediss' is installed"),
        ({"backend_config": {"pathh": "x"}}, "pathh"),
        ({"backend_config": '{"pathh": "x"}'}, "pathh"),
        ({"backend_config": "@nowhere.json"}, "backend_config: file nowhere.json: no such file"),
    ]
    for settings, message in wrong:
        named = {"backend": "file", "backend_config": {"path": str(folder)}} | settings
        memory = memoryview(np.zeros((N_ROWS, ROW_NBYTES), np.int8))
        tier = {"type": "HiCacheTier", "module_path": "hicache_core.integrations.vllm", **named}
        try:
            SecondaryTierFactory.create_secondary_tier(tier, memory, offloading_spec())
            said = "nothing"
        except HiCacheError as error:
            said = str(error)
        assert message in said, said


KILLED = """
import sys
from pathlib import Path
from vllm_tier_rules import Engine, keys_of
running = Engine({"backend": "file", "backend_config": {"path": sys.argv[1]}})
print(running.path, flush=True)
for n in range(1, 200):
    running.store(keys_of(n))
    print(n, flush=True)
"""


def rule_an_engine_killed_while_it_stores_leaves_right_pages_only(folder: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert child.stdout is not None
    region = Path(child.stdout.readline().strip())
    stored = [int(child.stdout.readline()) for _ in range(12)]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    region.unlink(missing_ok=True)
    with engine(folder) as next_one:
        assert next_one.hits(keys_of(*stored)) == [True] * len(stored)
