"""Time to first token of hits on host and file, against prefill of the same tokens.

The model has the shape of Llama 3 8B and random weights: how long it computes does not depend on
them. The cache is a whole one; the reference engine's runner computes.
"""

from __future__ import annotations

import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.place import Place
from benchmarks.gpu.report import Check, Finding
from benchmarks.harness import Row
from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.runner import Runner
from hicache_core.integrations.model_spec import kv_spec_of
from hicache_core.pools.device import DevicePool

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
REPEAT = 3
N_BEHIND = 16
"""Tokens of a prompt that are computed although all before them is a hit: a short new question."""

SAME = 0.1
"""How far logits may be apart, as a part of their spread: other shapes round otherwise."""

FLUSH_S = 30.0


@dataclass(frozen=True)
class Answer:
    """The first token of a prompt.

    Attributes:
        took_s: seconds from the question to its logits.
        n_hit: tokens of the prompt that were not computed.
        logits: on the CPU, (vocabulary,), float32.
    """

    took_s: float
    n_hit: int
    logits: torch.Tensor


class Prompts:
    """A model, its pages and a cache on the file backend, for prompts one after the other."""

    def __init__(self, place: Place, model: Any, store: Path, max_tokens: int) -> None:
        """Opens the cache; a second one on the same ``store`` finds there what the first put.

        Args:
            place: where the device pages are.
            model: a causal language model.
            store: folder of the file backend.
            max_tokens: room of the device tier.
        """
        self._place = place
        page_size = place.page_size
        spec = kv_spec_of(model, "random-weights")
        self._pool = DevicePool(spec, page_size, max_tokens // page_size, place.device)
        self._runner = Runner(model, self._pool)
        config = HiCacheConfig(
            page_size=page_size,
            hicache_ratio=1.5,
            hicache_storage_backend="file",
            hicache_storage_prefetch_policy="wait_complete",
            hicache_storage_max_read_nbytes=1 << 34,
            hicache_storage_max_write_nbytes=1 << 34,
            hicache_storage_backend_extra_config={
                "path": str(store),
                "prefetch_threshold": page_size,
            },
        )
        self._cache = HiCache(config, spec, self._pool)
        self._n_asked = 0

    def first_token(self, prompt: list[int]) -> Answer:
        """Computes a prompt over what the cache has of it; its pages go into the cache."""
        self._n_asked += 1
        cache, name = self._cache, f"prompt-{self._n_asked}"
        self._place.synchronize()
        began = time.perf_counter()
        self._fetch(name, prompt)
        match = cache.match_prefix(prompt[:-N_BEHIND], request_id=name)
        cache.lock(match.node)
        loaded = cache.load_back(match)
        n_pages = -(-len(prompt) // cache.page_size)
        pages = loaded.device_pages + cache.allocate(n_pages - len(loaded.device_pages))
        logits = self._compute(prompt, loaded.n_tokens, pages)
        took_s = time.perf_counter() - began
        whole = len(prompt) // cache.page_size
        result = cache.insert(prompt[: whole * cache.page_size], pages[:whole])
        cache.free(result.duplicates + pages[whole:])
        cache.unlock(match.node)
        return Answer(took_s, loaded.n_tokens, logits)

    def _fetch(self, name: str, prompt: list[int]) -> None:
        cache = self._cache
        if cache.prefetch(name, prompt):
            while not cache.prefetch_ready(name):
                cache.wait(0.01)
                cache.poll()
        cache.finish_prefetch(name)

    def _compute(self, prompt: list[int], n_past: int, pages: array[int]) -> torch.Tensor:
        """Logits of the next token, on the CPU; so all of it has been computed."""
        rows = self._runner.prefill(
            prompt[n_past:], n_past, pages, before_layer=self._cache.wait_layer
        )
        return rows[-1].cpu()

    def empty_device(self) -> bool:
        """Lets all pages leave the device, once they are on the host and stored; whether they
        have."""
        is_stored = self._cache.flush(FLUSH_S)
        while self._cache.evict(self._pool.n_pages):
            pass
        return is_stored

    def close(self) -> None:
        """Stores what is not stored, and gives all memory back."""
        self._cache.close(FLUSH_S)


def run(place: Place) -> Iterator[Finding]:
    """For two lengths: prefill, a hit on the host, a hit in the file store."""
    model = random_model(place)
    for length in (40, 64) if place.dry else (2048, 8000):
        with tempfile.TemporaryDirectory(prefix="hicache-ttft-") as store:
            yield from _of_length(place, model, Path(store), length)


def random_model(place: Place) -> Any:
    """A model of random weights, made on the device."""
    torch.manual_seed(0)
    fields: dict[str, Any] = TINY if place.dry else LLAMA_3_8B
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if place.dry else torch.bfloat16)
    try:
        with place.device:
            model: Any = LlamaForCausalLM(LlamaConfig(**fields))
            return model.eval()
    finally:
        torch.set_default_dtype(default)


def _of_length(place: Place, model: Any, store: Path, length: int) -> Iterator[Finding]:
    generator = torch.Generator().manual_seed(length)
    prompts = [
        torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        for _ in range(1 + (1 if place.dry else REPEAT))  # the first warms up
    ]
    cold: list[Answer] = []
    host: list[Answer] = []
    stored: list[bool] = []
    with closing(Prompts(place, model, store, 2 * length)) as first:
        for prompt in prompts:
            cold.append(first.first_token(prompt))
            stored.append(first.empty_device())
            host.append(first.first_token(prompt))
            first.empty_device()
    with closing(Prompts(place, model, store, 2 * length)) as second:  # as after a restart
        file = [second.first_token(prompt) for prompt in prompts]
    yield Check(f"{length} tokens are stored within {FLUSH_S:.0f} s", all(stored))
    table = f"time to first token of {length} tokens, {N_BEHIND} of them new"
    for name, found in (("prefill", cold), ("hit on the host", host), ("hit in the file", file)):
        baseline = None if found is cold else "prefill"
        samples = [1e3 * answer.took_s for answer in found[1:]]
        note = f"{found[-1].n_hit} tokens were hits"
        yield Row(table, name, "ms", samples, baseline=baseline, note=note)
    yield from _same_answers(length, cold, {"host": host, "file": file})


def _same_answers(
    length: int,
    cold: list[Answer],
    hits: dict[str, list[Answer]],
) -> Iterator[Check]:
    """Compares the logits of hits with those of prefill."""
    for tier, found in hits.items():
        apart = max(
            float((a.logits - b.logits).square().mean().sqrt() / a.logits.std())
            for a, b in zip(cold, found, strict=True)
        )
        n_hit = min(answer.n_hit for answer in found)
        rule = f"{length} tokens: a hit in the {tier} answers as prefill does"
        note = f"logits are {100 * apart:.2g} % of their spread apart; {n_hit} tokens were hits"
        yield Check(rule, apart < SAME and n_hit > length // 2, note)
