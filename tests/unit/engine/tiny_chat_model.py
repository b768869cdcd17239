"""A tiny random-weight model with a word tokenizer and a chat template, made on the spot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hicache_core.demo.script import HANDBOOK, OTHER_QUESTION, QUESTIONS

TEMPLATE = (
    "{% for m in messages %}<start> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)


def tiny_tokenizer() -> Any:
    """One token a word of the demo's script; an unknown word is <unk>."""
    text = " ".join([HANDBOOK, *QUESTIONS, OTHER_QUESTION, "system user assistant"])
    words = ["<unk>", "<start>", "<end>", *sorted(set(re.findall(r"\w+|[^\w\s]+", text)))]
    vocabulary = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<start>"],
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def tiny_chat_model(vocab_size: int) -> Any:
    """A two-layer Llama whose answers depend on its whole prompt; float32, eval mode."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tiny_windowed_chat_model(vocab_size: int) -> Any:
    """A Gemma 3 of two layers, one of which looks at the last 256 tokens; float32, eval mode."""
    torch.manual_seed(7)
    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(config).eval()


def save_tiny_windowed_chat_model(folder: Path) -> Path:
    """As ``save_tiny_chat_model``, with a window."""
    tokenizer = tiny_tokenizer()
    tiny_windowed_chat_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_chat_model(folder: Path) -> Path:
    """Model and tokenizer as a folder that ``hicache demo --model`` takes."""
    tokenizer = tiny_tokenizer()
    tiny_chat_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
