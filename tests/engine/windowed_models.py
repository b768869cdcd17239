"""Tiny models whose layers attend to a window of tokens, or to chunks of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from hicache_core.engine.model import LoadedModel

WINDOW = 8
"""Tokens that a layer with a window attends to; also the chunk of chunked attention."""

_SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "sliding_window": WINDOW,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_LAYERED = {**_SMALL, "num_hidden_layers": 3, "layer_types": _MIXED}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_LLAMA4 = {key: value for key, value in _SMALL.items() if key != "sliding_window"}

WINDOWED: dict[str, Callable[[], Any]] = {
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**_LAYERED)),
    "exaone4": lambda: hf.Exaone4ForCausalLM(hf.Exaone4Config(**_LAYERED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_LAYERED)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_LAYERED)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**_LAYERED, **_EXPERTS, rope_parameters=_ROPE)
    ),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **_LLAMA4,
            **_EXPERTS,
            num_hidden_layers=4,
            intermediate_size_mlp=96,
            attention_chunk_size=WINDOW,
            no_rope_layers=[1, 1, 1, 0],
        )
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SMALL, num_hidden_layers=3)),
    "olmo3": lambda: hf.Olmo3ForCausalLM(hf.Olmo3Config(**_LAYERED)),
}


def windowed_model(name: str) -> Any:
    """One of the models above, in eval mode; it never ends an answer by itself."""
    torch.manual_seed(7)
    model = WINDOWED[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # with transformers' own 0.02 hardly a token would matter
                parameter.normal_(0.0, 1.2 / math.sqrt(parameter.shape[-1]))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@functools.cache
def loaded_model(name: str) -> LoadedModel:
    """The same for an engine."""
    return LoadedModel(name, windowed_model(name), None)
