"""Engines of several ranks: rank 0 in the test's process, the others in processes of their own."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hicache_core.copies.base import Direction
from hicache_core.engine.config import EngineConfig
from hicache_core.engine.engine import Engine
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.shard import shard
from hicache_core.engine.tensor_ranks import TensorRanks
from hicache_core.integrations.model_spec import full_kv_spec_of
from tests.engine.world import cache_config
from tests.fork_server import CONTEXT
from tests.page_path.tiny_models import tiny_model

PATIENCE_S = 60.0
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}}

_meetings = itertools.count()

Poison = tuple[int, str]
"""A token, and the ranks on which it fails: ``all``, ``first``, ``other``."""


class NoLuckError(Exception):
    """What a poisoned forward raises."""


def split_model(architecture: str = "llama") -> Any:
    """A tiny model of four KV heads; a new one each time, since ranks cut theirs."""
    return tiny_model(architecture, **HEADS, **BIASES.get(architecture, {}))


@dataclass
class Ranks:
    """An engine that answers, and the processes behind it."""

    engine: Engine
    processes: list[Any]


@contextmanager
def engine_of_ranks(
    n_ranks: int,
    directory: Path,
    *,
    n_broken_loads: int = 0,
    poison: Poison | None = None,
    cache: dict[str, Any] | None = None,
    **config: Any,
) -> Iterator[Ranks]:
    """An open engine; at the end all of its processes must end by themselves.

    Args:
        n_ranks: how many; all but the first are processes.
        directory: where they meet.
        n_broken_loads: so many copies to the device fail on rank 1.
        poison: a token whose forward fails behind its first layer.
        cache, config: changes of the cache's and the engine's settings.
    """
    store = f"file://{directory / f'meeting-{next(_meetings)}'}"
    settings = EngineConfig(**{"device_tokens": 512, **config})
    processes = [
        CONTEXT.Process(
            target=follow,
            args=(rank, n_ranks, store, cache or {}, settings, n_broken_loads, poison),
        )
        for rank in range(1, n_ranks)
    ]
    for process in processes:
        process.start()
    try:
        with TensorRanks.create(0, n_ranks, store, timeout_s=PATIENCE_S) as ranks:
            loaded = LoadedModel("llama", split_model(), None)
            engine = Engine(loaded, cache_config(**(cache or {})), settings, ranks=ranks)
            engine.open()
            _poison(engine, 0, poison)
            try:
                yield Ranks(engine, processes)
            finally:
                engine.close(PATIENCE_S)
        for process in processes:
            process.join(PATIENCE_S)
            assert process.exitcode is not None, "a rank did not end"
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


def follow(
    rank: int,
    n_ranks: int,
    store: str,
    cache: dict[str, Any],
    settings: EngineConfig,
    n_broken_loads: int,
    poison: Poison | None,
) -> None:
    """A rank's whole life."""
    torch.set_num_threads(1)
    with TensorRanks.create(rank, n_ranks, store, timeout_s=PATIENCE_S) as ranks:
        loaded = LoadedModel("llama", split_model(), None)
        engine = Engine(loaded, cache_config(**cache), settings, ranks=ranks)
        engine.open()
        if rank == 1 and n_broken_loads:
            _break_loads(engine, n_broken_loads)
        _poison(engine, rank, poison)
        engine.join()
    sys.exit(1 if engine.status().error else 0)


def _poison(engine: Engine, rank: int, poison: Poison | None) -> None:
    """Lets the forward of a prompt fail in its second layer, on all ranks or on one."""
    if poison is None or poison[1] == ("other" if rank == 0 else "first"):
        return
    assert engine._ranks is not None
    engine._ranks.meet_s = 1.0 if poison[1] != "all" else PATIENCE_S
    runner: Any = engine._scheduler._runner
    prefill = runner.prefill

    def failing(ids: Any, *args: Any, **kwargs: Any) -> Any:
        before_layer = kwargs.pop("before_layer")

        def unlucky(layer: int) -> None:
            before_layer(layer)
            if layer == 1 and poison[0] in ids:
                raise NoLuckError("no such luck")

        return prefill(ids, *args, before_layer=unlucky, **kwargs)

    runner.prefill = failing


def _break_loads(engine: Engine, n_broken: int) -> None:
    """Lets the next copies to the device fail, as they are made."""
    transfer: Any = engine.cache.parts.transfer
    prepare = transfer._prepare
    left = iter(range(n_broken))

    def failing(direction: Direction, *pages: Any) -> Any:
        if direction is Direction.TO_HOST or next(left, None) is None:
            return prepare(direction, *pages)

        def copy(layers: range) -> None:
            raise RuntimeError("no such luck")

        return copy

    transfer._prepare = failing


def sharded_logits(rank: int, store: str, architecture: str, pipe: Any) -> None:
    """Sends the logits of one of two ranks, and those of the whole model."""
    torch.set_num_threads(1)
    with TensorRanks.create(rank, 2, store, timeout_s=PATIENCE_S) as ranks, torch.inference_mode():
        model = split_model(architecture)
        ids = torch.arange(40)[None]
        whole = model(ids).logits
        spec = shard(model, full_kv_spec_of(model, "tiny"), ranks)
        pipe.send((spec.heads, whole.numpy(), model(ids).logits.numpy()))
