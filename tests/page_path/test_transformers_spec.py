"""What the adapter reads off a model: kinds of layers, the spec of its KV, its fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, Qwen3Config

from hicache_core.integrations.model_check import windows_of
from hicache_core.integrations.transformers import fingerprint_of_model, kv_spec_of
from hicache_core.kv.spec import KVSpec

from .tiny_models import ARCHITECTURES, COMMON, tiny_model


@pytest.fixture(params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def test_each_layer_has_the_window_of_transformers_own_cache() -> None:
    sliding = MistralConfig(**{**COMMON, "sliding_window": 8})
    assert windows_of(sliding) == (8, 8, 8)
    mixed = Qwen3Config(
        **COMMON,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    assert windows_of(mixed) == (0, 8, 0)


def test_the_spec_is_what_the_model_hands_to_its_cache(model: Any) -> None:
    assert kv_spec_of(model, "x") == KVSpec.from_model_config(
        model.config, fingerprint="x", dtype="float32"
    )
    assert kv_spec_of(model.to(torch.bfloat16), "x").components[0].dtype == "bfloat16"


def test_a_fingerprint_follows_weights_and_config_and_not_the_folder(
    model: Any, tmp_path: Path
) -> None:
    before = fingerprint_of_model(model)
    model.save_pretrained(tmp_path / "elsewhere")
    again = type(model).from_pretrained(tmp_path / "elsewhere").eval()
    assert fingerprint_of_model(again) == fingerprint_of_model(again)
    other = type(model).from_pretrained(tmp_path / "elsewhere").eval()
    assert fingerprint_of_model(other) == fingerprint_of_model(again)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    changed = fingerprint_of_model(model)
    model.config.rope_parameters["rope_theta"] *= 2
    assert len({before, changed, fingerprint_of_model(model)}) == 3
