"""What the connector refuses at start, in one sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hicache_core.errors import ConfigError
from hicache_core.integrations.vllm import keys
from hicache_core.integrations.vllm.blocks import Blocks
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
        model_config=SimpleNamespace(
            model=changed.get("model", "a/model"),
            dtype=changed.get("model_dtype", "bfloat16"),
            hf_overrides=changed.get("hf_overrides", {}),
            quantization=changed.get("quantization"),
            revision=changed.get("revision"),
        ),
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


def test_settings_of_a_backend_may_be_text_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "store.json"
    file.write_text('{"path": "/x"}')
    for text in ('{"path": "/x"}', f"@{file}"):
        settings = checked({"backend": "file", "backend_config": text})
        assert settings.backend_config == {"path": "/x"}


@pytest.mark.parametrize("text", ['{"password": "secret"', '["secret"]', "@secret.json"])
def test_text_that_is_no_settings_is_refused_and_its_values_are_not_said(text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.backend_config: ") as refused:
        checked({"backend": "file", "backend_config": text})
    assert text.startswith("@") or "secret" not in str(refused.value)


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


def namespace(**changed: Any) -> keys.ForeignNamespace:
    """The namespace of the model, but for what is changed."""
    said = {"version": "0.32.0", "page_nbytes": 128, "dtypes": ["a"], "cuts": [[1, 2, 64, 8]]}
    said |= {name: changed.pop(name) for name in {*said, "variant"} & changed.keys()}
    spec = {"num_kv_heads": 2, "head_size": 64} | changed.pop("spec", {})
    config, cache = model(spec=Full(**spec), **changed)
    (group,) = cache.kv_cache_groups
    return keys.connector_namespace(config, group, **said)


def test_whatever_changes_the_bytes_of_a_page_changes_the_namespace() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"page_nbytes": 256},
        {"dtypes": ["b"]},
        {"cuts": [[2, 2, 32, 8]]},
        {"variant": "fine-tuned"},
        {"model_dtype": "float16"},
        {"hf_overrides": {"rope_scaling": {"factor": 2}}},
        {"hf_overrides": {"rope_scaling": {"factor": 4}}},
        {"quantization": "fp8"},
        {"revision": "v2"},
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
    assert len({namespace(**changed).digest for changed in changes}) == len(changes)
    assert namespace(version="0.33.0").digest == namespace().digest


def test_blocks_that_are_cut_for_the_kernel_have_a_namespace_of_their_own() -> None:
    cut, whole = [
        Blocks(["0"], {"0": torch.zeros(shape)}, 4) for shape in [(8, 2, 64, 8), (4, 2, 128, 8)]
    ]
    assert cut.page_nbytes == whole.page_nbytes
    assert cut.cuts == [[2, 2, 64, 8]]
    assert whole.cuts == [[1, 2, 128, 8]]
    digests = [
        namespace(page_nbytes=blocks.page_nbytes, cuts=blocks.cuts).digest
        for blocks in (cut, whole)
    ]
    assert digests[0] != digests[1]


def test_the_order_of_overrides_does_not_matter() -> None:
    one, other = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert namespace(hf_overrides=one).digest == namespace(hf_overrides=other).digest


@pytest.mark.parametrize("overrides", [lambda config: config, {"architecture": object()}])
def test_overrides_that_cannot_be_compared_need_a_variant(overrides: object) -> None:
    with pytest.raises(ConfigError, match=r"hf_overrides of this model is a function.*variant"):
        namespace(hf_overrides=overrides)
    named = [namespace(hf_overrides=overrides, variant=name).digest for name in "ab"]
    assert named[0] != named[1]


def test_no_variant_is_no_part_of_the_namespace() -> None:
    assert "variant" not in namespace(variant="").details
    assert checked({"backend": "file"}).variant == ""
    assert checked({"backend": "file", "variant": "fp8"}).variant == "fp8"
