"""SGLang's engine, in its own environment: run_sglang.py ARGUMENTS

ARGUMENTS is JSON, for ``sglang.srt.entrypoints.engine.Engine``.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from json_lines import Commands, serve


def start() -> Commands:
    """Starts the engine."""
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(**json.loads(sys.argv[1]))

    def generate(prompts: list[list[int]], n_new: int) -> list[dict[str, Any]]:
        """Runs prompts one after the other."""
        answers = []
        for prompt in prompts:
            began = time.monotonic()
            sampling = {"temperature": 0, "max_new_tokens": n_new, "ignore_eos": True}
            out = engine.generate(input_ids=prompt, sampling_params=sampling)
            meta = out["meta_info"]
            answers.append(
                {
                    "tokens": list(out["output_ids"]),
                    "cached": meta["cached_tokens"],
                    "from_storage": (meta.get("cached_tokens_details") or {}).get("storage", 0),
                    "finish": meta["finish_reason"]["type"],
                    "seconds": time.monotonic() - began,
                }
            )
        return answers

    def forget() -> bool:
        """Empties the tiers of device and host; storage stays. False while SGLang is busy."""
        return bool(engine.flush_cache().success)

    def attach(backend: str, config: dict[str, Any]) -> list[Any]:
        """Attaches a storage backend at run time; answers whether it did, and SGLang's message."""
        done = engine.loop.run_until_complete(
            engine.tokenizer_manager.attach_hicache_storage(backend, json.dumps(config))
        )
        return [done.success, done.message]

    def detach() -> list[Any]:
        """Detaches it; answers as ``attach``."""
        done = engine.loop.run_until_complete(engine.tokenizer_manager.detach_hicache_storage())
        return [done.success, done.message]

    return {"generate": generate, "forget": forget, "attach": attach, "detach": detach}


if __name__ == "__main__":  # SGLang starts its processes by importing this module again
    serve(start)
