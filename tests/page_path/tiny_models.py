"""Tiny random-weight models of several architectures, and the pools that fit them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    # Far from transformers' 0.02: with it, a random model's answer hardly depends on its prompt.
    "initializer_range": 0.5,
}
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of ``architecture`` whose random weights depend on nothing but the architecture."""
    config_class, model_class, own = ARCHITECTURES[architecture]
    torch.manual_seed(len(architecture))
    model = model_class(config_class(**{**COMMON, **own, **changes})).to(dtype).eval()
    # A model built from a config would end at token 2, its config's default.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt_of(n_tokens: int, seed: int = 0) -> list[int]:
    """Random token ids that every model of this module knows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 512, (n_tokens,), generator=generator).tolist()
