"""vLLM's engine, in its own environment: run_vllm.py OPTIONS

OPTIONS is JSON: arguments of ``vllm.LLM`` beside ``ENGINE``; ``kv_transfer_config`` is one too.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from json_lines import Commands, serve

ENGINE = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "seed": 0,
    "block_size": 32,  # on a CPU a multiple of 32
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
}
TRANSFER = {
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",  # the default ends a request whose pages do not arrive
}


def start() -> Commands:
    """Starts the engine; it caches on the device alone without a ``kv_transfer_config``."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    options = json.loads(sys.argv[1])
    transfer = options.pop("kv_transfer_config", None)
    if transfer is not None:
        options["kv_transfer_config"] = KVTransferConfig(**TRANSFER | transfer)
    llm = LLM(**ENGINE | options)

    def generate(prompts: list[list[int]], n_new: int) -> list[dict[str, Any]]:
        """Runs prompts one after the other."""
        sampling = SamplingParams(
            temperature=0, max_tokens=n_new, ignore_eos=True, detokenize=False
        )
        answers = []
        for prompt in prompts:
            began = time.monotonic()
            (out,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
            answers.append(
                {
                    "tokens": list(out.outputs[0].token_ids),
                    "cached": out.num_cached_tokens,
                    "finish": out.outputs[0].finish_reason,
                    "seconds": time.monotonic() - began,
                }
            )
        return answers

    def forget() -> bool:
        """Empties the device's cache and what a connector holds in memory; storage stays."""
        return bool(llm.reset_prefix_cache(reset_connector=True))

    return {"generate": generate, "forget": forget}


if __name__ == "__main__":  # vLLM starts its processes by importing this module again
    serve(start)
