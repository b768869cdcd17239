"""How the engines are started: what each needs on a CPU, small and with the same weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SGLANG = {
    "device": "cpu",
    "attention_backend": "torch_native",  # the default needs AMX
    "grammar_backend": "none",
    "disable_overlap_schedule": True,
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "random_seed": 0,
    "page_size": 64,
    "max_total_tokens": 4096,
    "context_length": 4096,
    "max_running_requests": 8,
    "log_level": "info",
}
_TIERS = {
    "enable_hierarchical_cache": True,
    "hicache_ratio": 2.0,
    "hicache_write_policy": "write_through",
    "hicache_storage_prefetch_policy": "wait_complete",
}
_VLLM = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "seed": 0,
    "block_size": 32,  # on a CPU a multiple of 32
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
}
_TRANSFER = {
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",  # the default ends a request whose pages do not arrive
}


def sglang(model: Path, **layout: Any) -> dict[str, Any]:
    """Arguments of SGLang's engine.

    Args:
        model: the folder of the model.
        layout: further ones, such as ``hicache_mem_layout``; without any it caches on the device
            alone.
    """
    return {"model_path": str(model), **_SGLANG, **(_TIERS if layout else {}), **layout}


def vllm(model: Path, transfer: Mapping[str, Any] | None = None, **further: Any) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM``.

    Args:
        model: the folder of the model.
        transfer: its ``kv_transfer_config``; without one it caches on the device alone.
        further: more arguments.
    """
    config = {} if transfer is None else {"kv_transfer_config": {**_TRANSFER, **transfer}}
    return {"model": str(model), **_VLLM, **config, **further}


def as_flags(arguments: Mapping[str, Any]) -> list[str]:
    """The same as flags of a command line."""
    flags = []
    for name, value in arguments.items():
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return flags
