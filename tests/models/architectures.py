"""What is special about single architectures: fields of their tiny configurations, and variants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Fields = Mapping[str, Any]

CONV, FULL, LINEAR, WINDOW = "conv", "full_attention", "linear_attention", "sliding_attention"

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LOCAL = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
_BLT_PART = {**_LOCAL, "hidden_size_global": 128, "num_hidden_layers": 1}
_NOTE = {
    "num_key_value_heads": 4,
    "sliding_window": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_qk_rope_head_dim": 8,
    "swa_v_head_dim": 16,
}

OWN: dict[str, Fields] = {
    # Sizes that must fit each other.
    "falcon_h1": {"mamba_d_ssm": 128},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {"num_key_value_heads": 4},
    "zamba2": {"num_key_value_heads": 4, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {
        "attn_layers": ["local", "local"],
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [32, 32],
        "is_decoder": True,
    },
    # Published models have layers of several kinds, which the default configuration lacks.
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": [WINDOW, FULL, WINDOW, FULL],
        "rope_parameters": {FULL: dict(_ROPE), WINDOW: dict(_ROPE)},
    },
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "lfm2": {"layer_types": [CONV, FULL, CONV, FULL]},
    "lfm2_moe": {"layer_types": [CONV, FULL, CONV, FULL]},
    # As published, full layers have other heads than those with windows.
    "gemma4": {"text_config": {"global_head_dim": 32}},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified": {"text_config": {"global_head_dim": 32}},
    "gemma4_unified_text": {"global_head_dim": 32},
    "mimo_v2_flash": {"swa_num_key_value_heads": 4},
    "dots3_note": {"text_config": {**_NOTE, "per_layer_config": {}}},
    "dots3_note_text": _NOTE,
    # Parts that have no default, or a large one.
    "blt": {
        "decoder_config": _BLT_PART,
        "encoder_config": _BLT_PART,
        "encoder_hash_byte_group_vocab": 64,
        "global_config": {**_LOCAL, "hidden_size": 128},
        "patcher_config": _LOCAL,
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
}

_WINDOWS = {"sliding_window": 32}
_QWEN_WINDOWS = {"use_sliding_window": True, "layer_types": [WINDOW, FULL, WINDOW, FULL]}

VARIANTS: dict[str, dict[str, Fields]] = {
    "bart": {"more encoder layers": {"encoder_layers": 6}},
    "doge": {"windows": _WINDOWS},
    "falcon": {
        "alibi": {"alibi": True},
        "several KV heads": {"new_decoder_architecture": True},
    },
    "gemma3n_text": {"no shared KV": {"num_kv_shared_layers": 0}},
    "gemma4_text": {
        "one head size": {"global_head_dim": 16},
        "shared KV": {"num_kv_shared_layers": 2},
    },
    "gpt_neo": {"global only": {"attention_types": [[["global"], 4]]}},
    "granitemoehybrid": {"full only": {"layer_types": [FULL] * 4}},
    "laguna": {"windows": {"layer_types": [WINDOW, FULL] * 2, **_WINDOWS}},
    "lfm2": {"full only": {"layer_types": [FULL] * 4}},
    "mellum": {"windows": {"layer_types": [WINDOW, FULL] * 2, **_WINDOWS}},
    "ministral3": {"windows": _WINDOWS},
    "mistral": {"no windows": {"sliding_window": None}},
    "mixtral": {"windows": _WINDOWS},
    "nemotron_h": {
        "attention and MLP": {"layers_block_type": [FULL, "mlp", FULL, "mlp"]},
    },
    "phi3": {"windows": _WINDOWS},
    "phimoe": {"windows": _WINDOWS},
    "qwen2": {"windows": _QWEN_WINDOWS},
    "qwen2_moe": {"windows": _QWEN_WINDOWS},
    "qwen3": {"windows": _QWEN_WINDOWS},
    "qwen3_moe": {"windows": {"use_sliding_window": True}},
    "smollm3": {"windows": {**_WINDOWS, **_QWEN_WINDOWS}},
    "starcoder2": {"windows": _WINDOWS},
    "xlm": {"causal": {"causal": True}},
}
"""Settings of an architecture with which its layers keep something else than by default."""

CLASSES = {
    "musicgen": (
        "transformers.models.musicgen.configuration_musicgen:MusicgenDecoderConfig",
        "transformers:MusicgenForCausalLM",
    ),
    "musicgen_melody": (
        "transformers.models.musicgen_melody.configuration_musicgen_melody:MusicgenMelodyDecoderConfig",
        "transformers:MusicgenMelodyForCausalLM",
    ),
}
"""Where transformers' tables name an encoder-decoder: classes of the decoder's configuration and of
the decoder."""


@dataclass(frozen=True, slots=True)
class Case:
    """One model to try.

    Attributes:
        architecture: a ``model_type`` of transformers.
        variant: the name of one of its variants; empty for its default.
        own: fields of its configuration that are not those of any tiny one.
    """

    architecture: str
    variant: str = ""
    own: Fields = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.architecture} ({self.variant})" if self.variant else self.architecture


def cases_of(architecture: str) -> Iterator[Case]:
    """An architecture by default, and its variants."""
    own = OWN.get(architecture, {})
    yield Case(architecture, "", own)
    for variant, fields in VARIANTS.get(architecture, {}).items():
        yield Case(architecture, variant, {**own, **fields})


ARCHITECTURES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""All causal language models of transformers."""
