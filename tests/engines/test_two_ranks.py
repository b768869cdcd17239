"""Tensor parallelism over our store: two ranks of an engine, each with its own part of a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engines import options
from tests.engines.environments import SGLANG, VLLM, running
from tests.engines.scene import PROMPTS, Engine
from tests.engines.stores import running_store

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

ONE_CORE_EACH = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def test_both_ranks_of_sglang_hit_what_they_stored(model: Path, tmp_path: Path) -> None:
    with running_store("file", tmp_path / "store") as store:
        arguments = options.sglang(
            model,
            tp_size=2,
            hicache_mem_layout="page_first",
            hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config=json.dumps(options.sglang_storage(store.named)),
        )
        with running(SGLANG[0], tmp_path, arguments, variables_of=ONE_CORE_EACH) as (child,):
            engine = Engine(child, 64, "from_storage")
            engine.store_all(engine.alone())
        assert len(store.pages()) == 2 * len(PROMPTS) * engine.n_cached // 64


@pytest.mark.parametrize("way", [options.vllm_tier, options.vllm_connector])
def test_both_ranks_of_vllm_hit_what_they_stored(
    way: Callable[[Mapping[str, Any]], dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    with running_store("file", tmp_path / "store") as store:
        arguments = options.vllm(model, way(store.named), tensor_parallel_size=2)
        with running(VLLM, tmp_path, arguments, variables_of=ONE_CORE_EACH) as (child,):
            engine = Engine(child, 32, "cached")
            engine.store_all(engine.alone())
