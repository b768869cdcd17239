"""LMCache's L2 adapters side by side: ours on the file backend, LMCache's ``fs`` and ``fs_native``.

Run by the Python of LMCache's environment, from this repository; ``TMPDIR`` chooses the disk::

    TMPDIR=/a/disk python -m benchmarks.engines.lmcache [--quick]

Ours seals each chunk with a checksum and checks it at each load; the other two do neither.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import select
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.memory_management import MemoryObjMetadata, TensorMemoryObj

from benchmarks.harness import InTurn, Row, run_alone
from hicache_core.integrations.foreign.answer import Answer
from hicache_core.integrations.foreign.opening import open_store
from hicache_core.integrations.lmcache.adapter import N_THREADS
from hicache_core.integrations.lmcache.parts import Submit, submit_in_parts
from hicache_core.types import Page

N_CHUNKS = 128
NBYTES = 1 << 20
SHAPE, DTYPE = torch.Size([8, 64, 1024]), torch.bfloat16
LAYOUTS = {0: MemoryLayoutDesc([SHAPE], [DTYPE])}

OURS, STORE, NATIVE, FS = "ours, file", "its store without the adapter", "fs_native", "fs"
WHAT = ("128 absent keys", "set", "128 present keys", "get")
TARGETS = {
    (OURS, "128 absent keys"): "at most 1 ms",
    (OURS, "set"): "at most 0.8 × fs_native",
    (OURS, "get"): "at most 0.8 × fs_native",
}

Calls = dict[str, Callable[[Sequence[ObjectKey]], None]]


class Memory:
    """What is stored and where it is loaded to, in one piece as LMCache's L1."""

    def __init__(self) -> None:
        self.bytes = torch.empty(2 * N_CHUNKS * NBYTES, dtype=torch.uint8)
        self.source, self.target = self.bytes.chunk(2)
        self.source.random_(0, 255)
        pointer = self.bytes.data_ptr()
        self.described = L1MemoryDesc(ptr=pointer, size=self.bytes.numel(), align_bytes=4096)

    def chunks(self, half: torch.Tensor) -> list[Any]:
        """The chunks in one half, as LMCache hands them to an adapter."""
        return [
            TensorMemoryObj(
                part,
                MemoryObjMetadata(SHAPE, DTYPE, part.data_ptr(), NBYTES, ref_count=1),
                parent_allocator=None,
            )
            for part in half.chunk(N_CHUNKS)
        ]


def adapter_calls(adapter: Any, memory: Memory) -> Calls:
    """Calls of an L2 adapter, each of which returns when LMCache would have the answer."""
    source, target = memory.chunks(memory.source), memory.chunks(memory.target)

    def ended(fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(60_000):
            raise TimeoutError("a task of the adapter has not ended within 60 s")
        os.eventfd_read(fd)

    def lookup(n_expected: int, keys: Sequence[ObjectKey]) -> None:
        task = adapter.submit_lookup_and_lock_task(keys, LAYOUTS)
        ended(adapter.get_lookup_and_lock_event_fd())
        assert adapter.query_lookup_and_lock_result(task).popcount() == n_expected

    def store(keys: Sequence[ObjectKey]) -> None:
        task = adapter.submit_store_task(keys, source)
        ended(adapter.get_store_event_fd())
        assert adapter.pop_completed_store_tasks()[task].is_successful()

    def load(keys: Sequence[ObjectKey]) -> None:
        task = adapter.submit_load_task(keys, target)
        ended(adapter.get_load_event_fd())
        assert adapter.query_load_result(task).popcount() == len(keys)

    return dict(
        zip(WHAT, (partial(lookup, 0), store, partial(lookup, N_CHUNKS), load), strict=True)
    )


def store_calls(store: Any, memory: Memory) -> Calls:
    """The same calls on the store below our adapter, with keys and pages made beforehand."""
    namespace = "0123456789abcdef"
    views = [half.numpy().data for half in (memory.source, memory.target)]
    source, target = (
        [(view[n * NBYTES : (n + 1) * NBYTES],) for n in range(N_CHUNKS)] for view in views
    )

    def answered(n_expected: int, submit: Callable[..., None], *arguments: object) -> None:
        event, answers = threading.Event(), list[Answer]()

        def on_done(answer: Answer) -> None:
            answers.append(answer)
            event.set()

        submit(*arguments, on_done)
        event.wait(60)
        assert sum(answers[0].mask) == n_expected

    def names(keys: Sequence[ObjectKey]) -> list[str]:
        return [f"{namespace}/{key.chunk_hash.hex()}" for key in keys]

    def lookup(n_expected: int, keys: Sequence[ObjectKey]) -> None:
        answered(n_expected, store.submit_exists, names(keys))

    def moved(submit: Submit, pages: Sequence[Page], keys: Sequence[ObjectKey]) -> None:
        in_parts = partial(submit_in_parts, submit, n_threads=N_THREADS)
        answered(N_CHUNKS, in_parts, names(keys), pages)

    calls = (
        partial(lookup, 0),
        partial(moved, store.submit_write, source),
        partial(lookup, N_CHUNKS),
        partial(moved, store.submit_read, target),
    )
    return dict(zip(WHAT, calls, strict=True))


def adapter_of(spec: Mapping[str, object], memory: Memory) -> Any:
    """The L2 adapter that LMCache's server makes of a ``--l2-adapter``."""
    arguments = argparse.Namespace(l2_adapter=[json.dumps(spec)])
    (config,) = parse_args_to_l2_adapters_config(arguments).adapters
    return create_l2_adapter(config, l1_memory_desc=memory.described)


def rows(quick: bool) -> Iterator[Row]:
    """Set, get and lookups of every path in turn, a few times."""
    logging.disable(logging.INFO)
    memory = Memory()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        max_nbytes = 4 * N_CHUNKS * NBYTES
        config = {"path": str(folder / "ours"), "max_nbytes": max_nbytes}
        plugin = {
            "type": "plugin",
            "module_path": "hicache_core.integrations.lmcache",
            "class_name": "HiCacheL2Adapter",
            "adapter_params": {"backend": "file", "backend_config": config},
        }
        store = open_store("file", {"path": str(folder / "store"), "max_nbytes": max_nbytes})
        theirs = {kind: {"type": kind, "base_path": str(folder / kind)} for kind in (NATIVE, FS)}
        adapters = {OURS: adapter_of(plugin, memory)}
        adapters |= {kind: adapter_of(spec, memory) for kind, spec in theirs.items()}
        calls = {name: adapter_calls(adapter, memory) for name, adapter in adapters.items()}
        calls[STORE] = store_calls(store, memory)
        samples = InTurn()
        for n, name in itertools.product(range(4 if quick else 12), calls):
            keys = [ObjectKey(os.urandom(32), "a/model", 0) for _ in range(N_CHUNKS)]
            for what, call in calls[name].items():
                samples.call(name, what, partial(call, keys), counts=n > 0)
            assert torch.equal(memory.source, memory.target)
            memory.target.zero_()
            if name in theirs:
                shutil.rmtree(folder / name)
                (folder / name).mkdir()
        for one in (*adapters.values(), store):
            one.close()
    for what in WHAT:
        for name in (NATIVE, FS, STORE, OURS):
            table = f"LMCache's L2 adapters, 128 chunks of 1 MiB: {what}"
            yield samples.row(table, name, what, NATIVE, TARGETS.get((name, what)))


if __name__ == "__main__":
    run_alone("engines.lmcache")
