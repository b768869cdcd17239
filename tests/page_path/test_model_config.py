"""The sizes that a ``config.json`` gives are those of the loaded model, group by group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config, LlamaConfig, Qwen2Config

from hicache_core.errors import SpecError
from hicache_core.integrations.model_spec import kv_spec_of
from hicache_core.kv.model_config import read_model_config, spec_of_config
from hicache_core.kv.spec import KVSpec
from tests.page_path.mixed_models import mixed_config, mixed_model

KNOWN = ["gemma2", "gemma3", "gpt_oss", "llama4", "mistral", "qwen3_next", "qwen3_5"]
UNKNOWN_STATES = ["bamba", "granitemoehybrid", "lfm2"]


def sizes(spec: KVSpec) -> dict[str, Any]:
    """Bytes a token and layers of the full pages, then of each group, with its window."""
    parts = [("full", spec, 0), *((group.name, group.spec, group.window) for group in spec.groups)]
    return {
        name: (
            part.token_nbytes,
            window,
            {layer for one in part.components for layer in part.layers_of(one)},
        )
        for name, part, window in parts
    }


@pytest.mark.parametrize("name", KNOWN)
def test_groups_of_a_config_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    mixed_config(name).save_pretrained(tmp_path)
    spec = spec_of_config(read_model_config(tmp_path), dtype="float32")
    assert sizes(spec) == sizes(kv_spec_of(mixed_model(name), "m"))


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2),
        Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2),
        DeepseekV3Config(num_hidden_layers=5, kv_lora_rank=32, qk_rope_head_dim=8),
    ],
    ids=lambda config: config.model_type,
)
def test_without_windows_all_layers_have_full_pages(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    spec = spec_of_config(read_model_config(tmp_path / "config.json"), dtype="bfloat16")
    whole = KVSpec.from_model_config(config, fingerprint="m", dtype="bfloat16")
    assert sizes(spec) == sizes(whole)
    assert spec.groups == ()


@pytest.mark.parametrize("name", ["nemotron_h", "falcon_h1", "mamba2"])
def test_a_config_that_does_not_say_which_layers_keep_a_state_is_refused(
    name: str, tmp_path: Path
) -> None:
    mixed_config(name).save_pretrained(tmp_path)
    with pytest.raises(SpecError):
        spec_of_config(read_model_config(tmp_path), dtype="float32")


@pytest.mark.parametrize("name", UNKNOWN_STATES)
def test_a_state_whose_size_a_config_does_not_tell_is_asked_for(name: str, tmp_path: Path) -> None:
    mixed_config(name).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    with pytest.raises(SpecError, match="give the bytes of a snapshot"):
        spec_of_config(config, dtype="float32")
    spec = spec_of_config(config, dtype="float32", state_nbytes=1000)
    assert [(group.name, group.spec.token_nbytes) for group in spec.groups] == [("mamba", 1000)]
    assert sizes(spec)["full"] == sizes(kv_spec_of(mixed_model(name), "m"))["full"]
