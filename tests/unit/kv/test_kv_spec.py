"""KVSpec: sizes, constructors, what a config must have, identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from hicache_core.errors import SpecError
from hicache_core.kv.spec import DTYPE_NBYTES, Component, KVSpec


def config(**fields: Any) -> SimpleNamespace:
    """A config of a small GQA model, with ``fields`` changed; None removes a field."""
    base: dict[str, Any] = {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "dtype": "bfloat16",
    }
    base |= fields
    return SimpleNamespace(**{name: value for name, value in base.items() if value is not None})


def spec_of(**fields: Any) -> KVSpec:
    return KVSpec.from_model_config(config(**fields), fingerprint="f")


def mha(**fields: Any) -> KVSpec:
    base: dict[str, Any] = {
        "num_layers": 4,
        "num_heads": 2,
        "head_dim": 8,
        "dtype": "bfloat16",
        "fingerprint": "f",
    }
    return KVSpec.mha(**(base | fields))


@pytest.mark.parametrize("name", DTYPE_NBYTES)
def test_the_table_of_dtypes_agrees_with_torch(name: str) -> None:
    assert getattr(torch, name).itemsize == DTYPE_NBYTES[name]


def test_mha_counts_keys_and_values() -> None:
    spec = mha()
    assert [c.name for c in spec.components] == ["k", "v"]
    assert spec.token_nbytes == 4 * 2 * (2 * 8 * 2)
    assert spec.page_nbytes(64) == 64 * spec.token_nbytes
    assert (spec.layers, spec.heads) == ((0, 4), (0, 2, 2))


def test_values_may_be_narrower_than_keys() -> None:
    spec = mha(v_head_dim=4)
    assert [c.row_nbytes for c in spec.components] == [32, 16]


def test_fp8_with_scales_has_four_components() -> None:
    spec = mha(dtype="float8_e4m3fn", scale_dtype="float32")
    assert [c.name for c in spec.components] == ["k", "v", "k_scale", "v_scale"]
    assert [c.row_nbytes for c in spec.components] == [16, 16, 8, 8]


def test_mla_is_one_latent_of_all_heads() -> None:
    spec = KVSpec.mla(
        num_layers=3, kv_lora_rank=512, rope_dim=64, dtype="bfloat16", fingerprint="f"
    )
    assert spec.token_nbytes == 3 * 576 * 2
    assert spec.heads == (0, 1, 1)


def test_heads_default_to_query_heads_and_head_dim_to_its_share_of_the_hidden_size() -> None:
    spec = spec_of(num_key_value_heads=None)
    assert spec.components[0] == Component("k", (8, 8), "bfloat16")


@pytest.mark.parametrize(
    ("real", "row"),
    [
        (transformers.LlamaConfig(num_key_value_heads=8), (8, 128)),
        (transformers.MistralConfig(), (8, 128)),
        (transformers.Qwen3Config(num_attention_heads=16, head_dim=128), (32, 128)),
    ],
    ids=["llama", "mistral", "qwen3 with a head_dim of its own"],
)
def test_real_configs_of_gqa_models(real: transformers.PretrainedConfig, row: tuple[int]) -> None:
    if isinstance(real, transformers.Qwen3Config):
        real.num_key_value_heads, real.num_attention_heads = 32, 64
    spec = KVSpec.from_model_config(real, fingerprint="f", dtype="float16")
    assert spec.num_layers == real.num_hidden_layers
    assert [c.shape for c in spec.components] == [row, row]
    assert {c.dtype for c in spec.components} == {"float16"}


@pytest.mark.parametrize("kind", [transformers.DeepseekV2Config, transformers.DeepseekV3Config])
def test_real_configs_of_mla_models(kind: Callable[..., transformers.PretrainedConfig]) -> None:
    real = kind(kv_lora_rank=512, qk_rope_head_dim=64)
    spec = KVSpec.from_model_config(real, fingerprint="f", dtype="bfloat16")
    assert [(c.name, c.shape) for c in spec.components] == [("latent", (576,))]


def test_the_dtype_of_a_config_may_be_a_torch_dtype() -> None:
    assert spec_of(dtype=torch.float16).components[0].dtype == "float16"
    assert spec_of(dtype=None, torch_dtype="float32").components[0].dtype == "float32"


def test_the_text_part_of_a_multimodal_config_counts() -> None:
    outer = SimpleNamespace(text_config=config(dtype=None), dtype=torch.bfloat16)
    spec = KVSpec.from_model_config(outer, fingerprint="f")
    assert spec.components[0] == Component("k", (2, 8), "bfloat16")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": None}, "no 'num_hidden_layers'"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers'.* found 0"),
        ({"num_hidden_layers": True}, "'num_hidden_layers'.* found True"),
        ({"num_hidden_layers": "4"}, "'num_hidden_layers'.* found '4'"),
        ({"num_attention_heads": None}, "no 'num_attention_heads'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"num_key_value_heads": -2}, "'num_key_value_heads'.* found -2"),
        ({"head_dim": 8.0}, "'head_dim'.* found 8.0"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": 65}, "does not divide hidden_size 65"),
        ({"dtype": None}, "no 'dtype'"),
        ({"dtype": "int4"}, "dtype 'int4' is not one of float32"),
        ({"kv_lora_rank": 512}, "no 'qk_rope_head_dim'"),
        ({"kv_lora_rank": -1, "qk_rope_head_dim": 64}, "'kv_lora_rank'.* found -1"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "has linear_attention"),
    ],
)
def test_a_config_that_does_not_do_is_refused_by_the_name_of_its_field(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(**fields)


def test_a_config_may_have_values_of_another_width() -> None:
    assert [c.shape for c in spec_of(head_dim=16, v_head_dim=8).components] == [(2, 16), (2, 8)]


def test_sliding_window_layers_are_accepted() -> None:
    assert spec_of(layer_types=["full_attention", "sliding_attention"]).num_layers == 4


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "g"},
        {"dtype": "float16"},
        {"num_layers": 5},
        {"num_heads": 4},
        {"head_dim": 16},
        {"v_head_dim": 16},
        {"dtype": "float8_e4m3fn", "scale_dtype": "float32"},
    ],
)
def test_identity_tells_apart_what_is_not_interchangeable(change: dict[str, Any]) -> None:
    assert mha(**change).identity() != mha().identity()


def test_identity_tells_shards_apart_and_is_json() -> None:
    spec = mha()
    identities = [
        spec,
        spec.shard(layers=(0, 2)),
        spec.shard(layers=(2, 4)),
        spec.shard(heads=(0, 1)),
        spec.shard(heads=(1, 2)),
    ]
    texts = {json.dumps(shard.identity(), sort_keys=True) for shard in identities}
    assert len(texts) == len(identities)
    assert json.loads(json.dumps(spec.identity())) == spec.identity()


def test_a_shard_has_its_part_of_the_bytes() -> None:
    spec = mha(dtype="float8_e4m3fn", scale_dtype="float32")
    part = spec.shard(layers=(1, 3), heads=(1, 2))
    assert part.token_nbytes * 4 == spec.token_nbytes
    assert (part.layers, part.heads) == ((1, 3), (1, 2, 2))
    assert part.shard(layers=(2, 3)).layers == (2, 3)
    assert spec.shard() == spec


def test_a_latent_is_the_same_for_every_rank() -> None:
    spec = KVSpec.mla(num_layers=3, kv_lora_rank=8, rope_dim=4, dtype="bfloat16", fingerprint="f")
    assert spec.shard(heads=(0, 1)) == spec
    with pytest.raises(SpecError, match="heads"):
        spec.shard(heads=(0, 2))


@pytest.mark.parametrize(
    ("layers", "heads"), [((0, 5), None), ((2, 2), None), (None, (1, 3)), ((-1, 2), None)]
)
def test_a_shard_must_lie_inside(layers: Any, heads: Any) -> None:
    with pytest.raises(SpecError):
        mha().shard(layers=layers, heads=heads)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"components": (Component("k", (1,), "int8"),) * 2}, "distinct names"),
        ({"num_layers": 3}, "are not 3 layers"),
        ({"layers": (-1, 3)}, "are not 4 layers"),
        ({"heads": (1, 1, 2)}, "heads"),
        ({"heads": (0, 3, 2)}, "heads"),
        ({"model_fingerprint": ""}, "model_fingerprint is empty"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = {
        "components": (Component("k", (1,), "int8"),),
        "num_layers": 4,
        "model_fingerprint": "f",
        "layers": (0, 4),
        "heads": (0, 1, 1),
    }
    assert KVSpec(**whole).num_layers == 4
    with pytest.raises(SpecError, match=message):
        KVSpec(**(whole | fields))


@pytest.mark.parametrize("shape", [(), (0,), (2, -1), (2.0,)])
def test_a_row_needs_a_shape_of_positive_integers(shape: Any) -> None:
    with pytest.raises(SpecError, match="'k'"):
        Component("k", shape, "int8")
