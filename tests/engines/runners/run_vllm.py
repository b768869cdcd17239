"""vLLM's engine, in its own environment: run_vllm.py ARGUMENTS

ARGUMENTS is JSON, for ``vllm.LLM``; ``kv_transfer_config`` is an object in it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from json_lines import Commands, serve


def start() -> Commands:
    """Starts the engine."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    arguments = json.loads(sys.argv[1])
    if "kv_transfer_config" in arguments:
        arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    llm = LLM(**arguments)

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
