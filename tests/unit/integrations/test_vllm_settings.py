"""What the connector refuses at start, in one sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hicache_core.errors import ConfigError
from hicache_core.integrations.vllm import keys
from hicache_core.integrations.vllm.settings import checked_settings, why_not


class Full(SimpleNamespace):
    """Stands for vLLM's blocks of full attention."""


class Latent(Full):
    """Stands for a subclass with other bytes."""


def model(**changed: Any) -> tuple[Any, Any]:
    """vLLM's configuration of a model that fits, but for what is changed."""
    spec = changed.get("spec", Full(page_size_bytes=64, unpadded_page_size_bytes=64))
    parallel = {
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "tensor_parallel_size": 2,
        "rank": 0,
    }
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel | changed.get("parallel", {})),
        cache_config=SimpleNamespace(
            kv_cache_layout=changed.get("layout", "LBHNC"),
            cache_dtype=changed.get("cache_dtype", "auto"),
            block_size=changed.get("block_size", 32),
        ),
        model_config=SimpleNamespace(model=changed.get("model", "a/model")),
    )
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=changed.get("layers", ["0", "1"]))
    return config, SimpleNamespace(kv_cache_groups=[group] * changed.get("n_groups", 1))


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_full_attention_in_known_layouts_is_cached(layout: str) -> None:
    why_not(*model(layout=layout), Full)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"n_groups": 2}, "a model with 2 groups of KV blocks"),
        ({"spec": Latent()}, "blocks of the kind Latent"),
        ({"spec": Full(page_size_bytes=64, unpadded_page_size_bytes=60)}, "blocks with padding"),
        ({"parallel": {"pipeline_parallel_size": 2}}, "spread over pipeline stages"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "contexts that are spread"),
        ({"parallel": {"prefill_context_parallel_size": 2}}, "contexts that are spread"),
        ({"layout": "BHLNC"}, "the KV layout BHLNC"),
        ({"layout": None}, "the KV layout None"),
    ],
)
def test_what_is_not_known_is_refused_and_the_tier_is_named(
    changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"does not cache .*{words}.*; use HiCacheTier"):
        why_not(*model(**changed), Full)


def checked(extra: dict[str, Any], algorithm: str = "sha256", **environ: str) -> Any:
    return checked_settings(extra, hash_algorithm=algorithm, environ=environ)


def test_a_backend_and_its_settings_are_taken() -> None:
    settings = checked({"backend": "file", "backend_config": {"path": "/x"}})
    assert (settings.backend, settings.backend_config) == ("file", {"path": "/x"})
    assert settings.host_bytes == 1 << 30


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, "kv_connector_extra_config.backend"),
        ({"backend": "file", "bakcend_config": {}}, "bakcend_config"),
        ({"backend": "file", "host_bytes": 0}, "host_bytes"),
    ],
)
def test_settings_that_cannot_work_are_named(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        checked(extra)


def test_hashes_of_a_random_seed_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"xxhash_cbor starts from a random seed.*HASHSEED"):
        checked({"backend": "file"}, "xxhash_cbor")
    checked({"backend": "file"}, "xxhash", PYTHONHASHSEED="0")
    checked({"backend": "file"}, "sha256_cbor")


def test_whatever_changes_the_bytes_of_a_page_changes_the_namespace() -> None:
    def digest(version: str = "0.32.0", nbytes: int = 128, dtype: str = "a", **changed: Any) -> str:
        spec = {"num_kv_heads": 2, "head_size": 64} | changed.pop("spec", {})
        config, cache = model(spec=Full(**spec), **changed)
        (group,) = cache.kv_cache_groups
        return keys.connector_namespace(
            config, group, version=version, page_nbytes=nbytes, dtypes=[dtype]
        ).digest

    changes: list[dict[str, Any]] = [
        {},
        {"nbytes": 256},
        {"dtype": "b"},
        {"cache_dtype": "fp8"},
        {"block_size": 16},
        {"layout": "LBNHC"},
        {"layers": ["0"]},
        {"model": "another/model"},
        {"spec": {"num_kv_heads": 1}},
        {"spec": {"head_size": 32}},
        {"parallel": {"rank": 1}},
        {"parallel": {"tensor_parallel_size": 4}},
    ]
    assert len({digest(**changed) for changed in changes}) == len(changes)
    assert digest(version="0.33.0") == digest()
