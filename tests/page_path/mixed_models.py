"""Tiny models whose layers are not all alike, each with random weights that matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 320
WINDOW = 10
"""Tokens of a sliding window or a chunk; no multiple of a page."""

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MIXED = {"layer_types": [SLIDING, FULL] * 2, "sliding_window": WINDOW}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

_MODELS: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_SMALL, **_MIXED)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_SMALL, **_MIXED)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_SMALL, **_MIXED, **_EXPERTS)),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **{**_SMALL, "num_experts_per_tok": 1},
            num_local_experts=4,
            intermediate_size_mlp=96,
            layer_types=[CHUNKED, CHUNKED, CHUNKED, FULL],
            attention_chunk_size=WINDOW,
        )
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SMALL, sliding_window=WINDOW)),
}
WINDOWED = sorted(_MODELS)


def mixed_model(name: str) -> Any:
    """One of the models above, in eval mode; it never ends an answer by itself."""
    torch.manual_seed(11)
    model = _MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # with transformers' own 0.02 hardly a token would matter
                parameter.normal_(0.0, 1.2 / math.sqrt(parameter.shape[-1]))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()
