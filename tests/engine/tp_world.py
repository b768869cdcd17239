"""Engines of several ranks: rank 0 in the test's process, the others in processes of their own."""

from __future__ import annotations

import itertools
import json
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hicache_core.copies.base import Direction
from hicache_core.engine.config import EngineConfig
from hicache_core.engine.engine import Engine
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.shard import shard
from hicache_core.engine.tensor_ranks import TensorRanks
from hicache_core.integrations.model_spec import kv_spec_of
from tests.engine.windowed_models import windowed_model
from tests.engine.world import cache_config
from tests.fork_server import CONTEXT
from tests.page_path.tiny_models import tiny_model

PATIENCE_S = 60.0
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}}
WITH_WINDOWS = {"gemma2": "gemma2", "gemma3": "gemma3", "windows": "mistral"}

_meetings = itertools.count()

Poison = tuple[int, str]
"""A token, and the ranks on which it fails: ``all``, ``first``, ``other``."""


class NoLuckError(Exception):
    """What a poisoned forward raises."""


def split_model(architecture: str = "llama") -> Any:
    """A tiny model of four KV heads; a new one each time, since ranks cut theirs.

    One with windows has two KV heads: ``gemma2``, ``gemma3``, and ``windows``, a Mistral without a
    layer of full attention.
    """
    if architecture in WITH_WINDOWS:
        return windowed_model(WITH_WINDOWS[architecture])
    return tiny_model(architecture, **HEADS, **BIASES.get(architecture, {}))


@dataclass
class Decisions:
    """What one rank decides about pages and units: all must do alike.

    Attributes:
        taken: which pool, and the ids that it hands out, in order.
        end: what is known at the end: units that nobody has any more, and who was preempted.
    """

    taken: list[tuple[int, list[int]]] = field(default_factory=list)
    end: dict[str, list[int]] = field(default_factory=dict)

    def watch(self, engine: Engine) -> None:
        """Notes what the pools of an open engine hand out from now on."""
        for at, pool in enumerate((engine.pool, *engine.pool.groups)):
            allocator: Any = pool.allocator
            allocator.allocate = self._noting(at, allocator.allocate)

    def _noting(self, at: int, allocate: Any) -> Any:
        def noted(n: int) -> array[int]:
            units: array[int] = allocate(n)
            self.taken.append((at, units.tolist()))
            return units

        return noted

    def ended(self, engine: Engine) -> None:
        """Looks at an engine that has ended."""
        parts = engine.cache.parts
        parts.tree.check_integrity()
        held = [parts.tree.n_device_pages, *(group.held.n_device_units for group in parts.groups)]
        pools = (engine.pool, *engine.pool.groups)
        self.end["lost"] = [
            pool.n_pages - pool.allocator.n_free - n_held
            for pool, n_held in zip(pools, held, strict=True)
        ]
        tally = engine._scheduler.tally
        self.end["preempted"] = [tally.preempted]
        self.end["restarted"] = [tally.restarted]

    def text(self) -> str:
        """All of it."""
        return json.dumps([self.taken, self.end])


@dataclass(frozen=True)
class Told:
    """What a process is told of its engine: the arguments of ``engine_of_ranks``."""

    architecture: str
    cache: dict[str, Any]
    settings: EngineConfig
    n_broken_loads: int
    poison: Poison | None


@dataclass
class Ranks:
    """An engine that answers, and the processes behind it.

    Attributes:
        decisions: of rank 0.
        others: those of the other ranks, as text, once all have ended.
    """

    engine: Engine
    processes: list[Any]
    decisions: Decisions = field(default_factory=Decisions)
    others: list[str] = field(default_factory=list)


@contextmanager
def engine_of_ranks(
    n_ranks: int,
    directory: Path,
    *,
    architecture: str = "llama",
    n_broken_loads: int = 0,
    poison: Poison | None = None,
    cache: dict[str, Any] | None = None,
    **config: Any,
) -> Iterator[Ranks]:
    """An open engine; at the end all of its processes must end by themselves.

    Args:
        n_ranks: how many; all but the first are processes.
        directory: where they meet.
        architecture: one that ``split_model`` knows.
        n_broken_loads: so many copies to the device fail on rank 1, in each pool.
        poison: a token whose forward fails behind its first layer.
        cache, config: changes of the cache's and the engine's settings.
    """
    store = str(directory / f"meeting-{next(_meetings)}")
    settings = EngineConfig(**{"device_tokens": 512, **config})
    told = Told(architecture, cache or {}, settings, n_broken_loads, poison)
    processes = [
        CONTEXT.Process(target=follow, args=(rank, n_ranks, store, told))
        for rank in range(1, n_ranks)
    ]
    for process in processes:
        process.start()
    try:
        with TensorRanks.create(0, n_ranks, f"file://{store}", timeout_s=PATIENCE_S) as ranks:
            loaded = LoadedModel(architecture, split_model(architecture), None)
            engine = Engine(loaded, cache_config(**(cache or {})), settings, ranks=ranks)
            made = Ranks(engine, processes)
            engine.open()
            made.decisions.watch(engine)
            _poison(engine, 0, poison)
            try:
                yield made
            finally:
                engine.close(PATIENCE_S)
        made.decisions.ended(engine)
        for rank, process in enumerate(processes, 1):
            process.join(PATIENCE_S)
            assert process.exitcode is not None, "a rank did not end"
            if process.exitcode == 0:
                made.others.append(Path(f"{store}-{rank}").read_text())
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


def follow(
    rank: int,
    n_ranks: int,
    store: str,
    told: Told,
) -> None:
    """A rank's whole life; it leaves its decisions beside ``store``."""
    torch.set_num_threads(1)
    decisions = Decisions()
    with TensorRanks.create(rank, n_ranks, f"file://{store}", timeout_s=PATIENCE_S) as ranks:
        loaded = LoadedModel(told.architecture, split_model(told.architecture), None)
        engine = Engine(loaded, cache_config(**told.cache), told.settings, ranks=ranks)
        engine.open()
        decisions.watch(engine)
        if rank == 1 and told.n_broken_loads:
            _break_loads(engine, told.n_broken_loads)
        _poison(engine, rank, told.poison)
        engine.join()
    if engine.status().error:
        sys.exit(1)
    decisions.ended(engine)
    Path(f"{store}-{rank}").write_text(decisions.text())


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
    parts = engine.cache.parts
    for transfer in (parts.transfer, *(group.transfer for group in parts.groups)):
        _break_loads_of(transfer, n_broken)


def _break_loads_of(transfer: Any, n_broken: int) -> None:
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
        spec = shard(model, kv_spec_of(model, "tiny"), ranks)
        heads = {spec.heads, *(group.spec.heads for group in spec.groups)}
        pipe.send((heads, whole.numpy(), model(ids).logits.numpy()))
