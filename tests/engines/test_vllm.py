"""vLLM over our stores: a tier of its offloading, a connector, and LMCache's server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import options, trials
from tests.engines.environments import VLLM, running
from tests.engines.lmcache_server import CHUNK_TOKENS, lmcache_server
from tests.engines.scene import Engine
from tests.engines.stores import HAZARDS, Store, running_store
from tests.engines.trials import Pair

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

BLOCK_SIZE = 32


def tier(store: Store) -> dict[str, Any]:
    """Our tier below vLLM's own host memory; the copies to that memory are emulated on a CPU."""
    ours = {"type": "HiCacheTier", "module_path": "hicache_core.integrations.vllm"}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "vllm_cpu_offload",
            "cpu_bytes_to_use": 64 << 20,
            "secondary_tiers": [{**ours, **store.recovering}],
        },
    }


def connector(store: Store) -> dict[str, Any]:
    """Our connector; a load that failed would end the request, since it verifies before."""
    return {
        "kv_connector": "HiCacheConnector",
        "kv_connector_module_path": "hicache_core.integrations.vllm",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": store.recovering,
    }


@contextlib.contextmanager
def pair_of_engines(transfer: dict[str, Any], folder: Path, model: Path) -> Iterator[Pair]:
    """Two engines with this ``kv_transfer_config``."""
    arguments = options.vllm(model, transfer)
    with running(VLLM, folder, arguments, arguments) as children:
        first, second = (Engine(child, BLOCK_SIZE, "cached") for child in children)
        yield Pair(first, second, first.alone())


@contextlib.contextmanager
def pair_with_servers(store: Store, folder: Path, model: Path) -> Iterator[Pair]:
    """Two engines with a server of LMCache each, whose L2 adapter is ours."""
    adapter = {
        "type": "plugin",
        "module_path": "hicache_core.integrations.lmcache",
        "class_name": "HiCacheL2Adapter",
        "adapter_params": store.recovering,
    }
    with (
        lmcache_server(folder, adapter) as near_first,
        lmcache_server(folder, adapter) as near_second,
    ):
        servers = near_first, near_second
        arguments = [options.vllm(model, server.transfer) for server in servers]
        with running(VLLM, folder, *arguments) as children:
            first, second = (
                Engine(child, CHUNK_TOKENS, "cached", server)
                for child, server in zip(children, servers, strict=True)
            )
            yield Pair(first, second, first.alone())


WAYS = ("tier", "connector", "lmcache")
ON_FILE_AND_VALKEY = [f"{way}-{backend}" for way in WAYS for backend in ("file", "redis")]
ON_VALKEY = [f"{way}-redis" for way in WAYS]
ON_OTHERS = ["tier-mooncake", "connector-hf3fs", "lmcache-s3"]


@pytest.fixture(scope="module")
def started(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pair, Store]]:
    """A pair on the store that the test names."""
    way, _, backend = request.param.partition("-")
    folder = tmp_path_factory.mktemp("vllm")
    with running_store(backend, folder / "store") as store:
        if way == "lmcache":
            opening = pair_with_servers(store, folder, model)
        else:
            transfer = tier(store) if way == "tier" else connector(store)
            opening = pair_of_engines(transfer, folder, model)
        with opening as pair:
            yield pair, store


@pytest.fixture
def pair(started: tuple[Pair, Store]) -> Pair:
    """The two engines, once the first has filled the store."""
    engines, _ = started
    engines.first.store_all(engines.expected)
    return engines


@pytest.fixture
def store(started: tuple[Pair, Store]) -> Store:
    """The store of the two."""
    return started[1]


@pytest.mark.parametrize("started", ON_FILE_AND_VALKEY + ON_OTHERS, indirect=True)
def test_what_one_process_stores_another_hits(pair: Pair) -> None:
    trials.hits(pair)


@pytest.mark.parametrize("started", ON_FILE_AND_VALKEY, indirect=True)
def test_a_damaged_page_is_refused_and_computed_again(pair: Pair, store: Store) -> None:
    trials.damage(pair, store)


@pytest.mark.parametrize("started", ON_VALKEY, indirect=True)
@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("when", ["between", "within"])
def test_a_store_that_is_lost_costs_hits_and_nothing_else(
    pair: Pair, store: Store, hazard: str, when: str
) -> None:
    try:
        trials.lose(pair, store, hazard, within=when == "within")
    finally:
        store.bring_back(hazard)


@pytest.mark.parametrize("started", ON_FILE_AND_VALKEY, indirect=True)
def test_an_engine_killed_while_it_stores_leaves_only_right_pages(
    pair: Pair, store: Store
) -> None:  # the first engine ends here, so this test is the last of its kind
    trials.kill_the_first(pair, store)
