"""Keys and namespaces of vLLM's chunks, without vLLM."""

from __future__ import annotations

from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import pytest

from hicache_core.errors import ConfigError
from hicache_core.integrations.vllm import keys

HASH = bytes(range(32))
FIRST, SECOND = bytes(4), bytes([0, 0, 0, 1])


def config(**changed: Any) -> SimpleNamespace:
    """What vLLM says of a model with one group of two layers, on one worker."""
    group = SimpleNamespace(tokens_per_block=16, layer_names=("layers.0", "layers.1"), group_id=0)
    fields: dict[str, Any] = {
        "groups": (group,),
        "worker_kv_bytes_per_block": 5000,
        "model": SimpleNamespace(name="a/model", dtype="bfloat16"),
        "cache": SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=2),
        "parallel": SimpleNamespace(world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1),
        "canonical_layout": False,
        "kv_cache_layout": "LBHNC",
    }
    return SimpleNamespace(**fields | changed)


def namespace(single_copy: bool = False, variant: str = "", **changed: Any) -> Any:
    return keys.tier_namespace(
        config(**changed), version="0.32.0", single_copy=single_copy, variant=variant
    )


def test_a_block_hash_of_the_first_group_is_taken_as_it_is() -> None:
    assert keys.offload_page_hash(HASH + FIRST) == HASH
    assert keys.offload_keys("n", [HASH + FIRST]) == [f"n/{HASH.hex()}"]


@pytest.mark.parametrize("key", [HASH + SECOND, HASH[:16] + FIRST, HASH[:16] + SECOND])
def test_other_groups_and_short_hashes_are_hashed_with_their_group(key: bytes) -> None:
    assert keys.offload_page_hash(key) == sha256(key).digest()


def test_short_hashes_agree_between_processes_only_with_a_set_seed() -> None:
    assert keys.keys_agree(keys.hash_nbytes_of(HASH + FIRST), {})
    assert not keys.keys_agree(keys.hash_nbytes_of(HASH[:16] + FIRST), {})
    assert keys.keys_agree(16, {"PYTHONHASHSEED": "0"})


def test_a_stored_row_has_no_padding() -> None:
    assert namespace().object_nbytes == 2 * 5000
    parallel = SimpleNamespace(world_size=2, tp_size=2, pp_size=1, pcp_size=1, dcp_size=1)
    assert namespace(parallel=parallel).object_nbytes == 2 * 2 * 5000
    assert namespace(parallel=parallel, single_copy=True).object_nbytes == 2 * 5000


def test_whatever_changes_the_bytes_of_a_row_changes_the_namespace() -> None:
    group = SimpleNamespace(tokens_per_block=16, layer_names=("layers.0",), group_id=0)
    parallel = SimpleNamespace(world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1)
    changes: list[dict[str, Any]] = [
        {},
        {"groups": (group,)},
        {"worker_kv_bytes_per_block": 5008},
        {"model": SimpleNamespace(name="another/model", dtype="bfloat16")},
        {"model": SimpleNamespace(name="a/model", dtype="float16")},
        {"cache": SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1)},
        {"cache": SimpleNamespace(tokens_per_hash=8, blocks_per_chunk=2)},
        {"canonical_layout": True},
        {"kv_cache_layout": "LBNHC"},
        {"single_copy": True},
        {"variant": "fine-tuned"},
    ]
    for size in ("tp_size", "pp_size", "pcp_size", "dcp_size"):
        changes.append({"parallel": SimpleNamespace(**vars(parallel) | {size: 2})})
    assert len({namespace(**changed).digest for changed in changes}) == len(changes)


def test_no_variant_is_no_part_of_the_namespace() -> None:
    assert "variant" not in namespace().details


def test_an_unknown_layout_and_rows_without_bytes_are_refused() -> None:
    with pytest.raises(ConfigError, match="which layout"):
        namespace(kv_cache_layout=None)
    with pytest.raises(ConfigError, match="0 bytes of KV"):
        namespace(worker_kv_bytes_per_block=0)


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.32.0+cpu", "0.33.1rc1"])
def test_versions_that_were_tried_are_accepted(version: str) -> None:
    keys.check_version(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "dev"])
def test_other_versions_are_refused_in_one_sentence(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"this is vLLM {version}, .* 0\.32 and 0\.33"):
        keys.check_version(version)


def test_the_package_imports_without_vllm_and_names_what_it_has() -> None:
    import hicache_core.integrations.vllm as package

    with pytest.raises(AttributeError, match="has no attribute 'Tier'"):
        package.Tier  # noqa: B018
    assert "HiCacheTier" in package.__all__
