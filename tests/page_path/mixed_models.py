"""Tiny models whose layers are not all alike, each with random weights that matter."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM

VOCABULARY = 512
WINDOW = 10
"""Tokens of a sliding window or a chunk; no multiple of a page."""

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR, CONV = "linear_attention", "conv"

# What a config of any of these classes takes, if it has the field.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "laurel_rank": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    # experts
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "topk_group": 1,
    # latent attention and its indexer
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 16,
    "index_topk": 16,
    # states
    "chunk_size": 16,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "mamba_chunk_size": 16,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_dt_rank": 8,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_groups": 1,
    "n_mamba_heads": 8,
    "ssm_state_size": 16,
    "state_size": 16,
    "adapter_rank": 8,
}
_MIXED = {"layer_types": [SLIDING, FULL] * 2}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
_STATES = {"layer_types": [LINEAR, FULL] * 2}
_ZAMBA = {"layers_block_type": [LINEAR, "hybrid"] * 2, "num_key_value_heads": 4}

# Config class of each model, and what it has of its own.
_WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", _MIXED),
    "gemma3": ("Gemma3TextConfig", _MIXED),
    "gpt_oss": ("GptOssConfig", _MIXED),
    "llama4": (
        "Llama4TextConfig",
        {"layer_types": [CHUNKED, CHUNKED, CHUNKED, FULL], "num_experts_per_tok": 1},
    ),
    "mistral": ("MistralConfig", {}),
}
_BY_LAYER = {
    "deepseek_v32": ("DeepseekV32Config", _LATENT),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 6,
            "layer_types": [SLIDING, FULL] * 3,
            "num_kv_shared_layers": 2,
            "intermediate_size": [96] * 6,
            "activation_sparsity_pattern": [0.0] * 6,
        },
    ),
    "gemma4": ("Gemma4TextConfig", {**_MIXED, "global_head_dim": 32}),
    "glm_moe_dsa": ("GlmMoeDsaConfig", _LATENT),
    "mimo_v2_flash": ("MiMoV2FlashConfig", {}),
}
_STATEFUL = {
    "bamba": ("BambaConfig", {"attn_layer_indices": [1, 3]}),
    "falcon_h1": ("FalconH1Config", {}),
    "granitemoehybrid": ("GraniteMoeHybridConfig", _STATES),
    "kimi_linear": ("KimiLinearConfig", {**_LATENT, **_STATES}),
    "lfm2": ("Lfm2Config", {"layer_types": [CONV, FULL] * 2}),
    "lfm3": ("Lfm3Config", {"layer_types": [CONV, SLIDING, CONV, FULL]}),
    "mamba2": ("Mamba2Config", {"num_heads": 8}),
    "nemotron_h": ("NemotronHConfig", {}),
    "olmo_hybrid": ("OlmoHybridConfig", {}),
    "qwen3_5": ("Qwen3_5TextConfig", {}),
    "qwen3_next": ("Qwen3NextConfig", {}),
    "zamba2": ("Zamba2Config", _ZAMBA),
}
_REFUSED = {
    "deepseek_v4": ("DeepseekV4Config", {}),
    "falcon_mamba": ("FalconMambaConfig", {}),
    "jamba": ("JambaConfig", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "mamba": ("MambaConfig", {}),
    "minimax": ("MiniMaxConfig", {}),
    "recurrent_gemma": ("RecurrentGemmaConfig", {}),
    "zamba": ("ZambaConfig", _ZAMBA),
}
_MODELS = {**_WINDOWED, **_BY_LAYER, **_STATEFUL, **_REFUSED}

WINDOWED, STATEFUL, REFUSED = sorted(_WINDOWED), sorted(_STATEFUL), sorted(_REFUSED)
MIXED = sorted({**_WINDOWED, **_BY_LAYER, **_STATEFUL})


def mixed_config(name: str) -> Any:
    """The configuration of one of the models above."""
    class_name, own = _MODELS[name]
    config_class = getattr(hf, class_name)
    fields = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{key: value for key, value in _SMALL.items() if key in fields} | own)


def mixed_model(name: str) -> Any:
    """One of the models above, in eval mode; it never ends an answer by itself."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(mixed_config(name)).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in key:
                # with transformers' own 0.02 hardly a token would matter
                parameter.normal_(0.0, 1.2 / math.sqrt(parameter.shape[-1]))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()
