"""Runs turns on a real model: each with the cache and again without any."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hicache_core.config.settings import HiCacheConfig
from hicache_core.demo.chat import Chat
from hicache_core.demo.plan import CORRUPTED_TURN
from hicache_core.demo.records import DemoSettings, Event, Facts, Note, Step, TurnPlan, TurnRecord
from hicache_core.demo.script import HANDBOOK, QUESTIONS
from hicache_core.engine.generation import Generation, generate_greedy
from hicache_core.engine.model import LoadedModel, load_folder, load_gguf
from hicache_core.engine.packaged import PACKAGED
from hicache_core.integrations.transformers import CachedModel, CachedTokens
from hicache_core.types import Namespace

DTYPE = torch.float32
WARM_UP_TOKENS = 256
FLUSH_TIMEOUT_S = 60.0

Say = Callable[[Event], None]


def load_model(settings: DemoSettings) -> LoadedModel:
    """The model of the settings, in ``DTYPE``."""
    if settings.model.lower() in PACKAGED:
        return PACKAGED[settings.model.lower()](DTYPE)
    path = Path(settings.model)
    return load_gguf(path, DTYPE) if path.is_file() else load_folder(path, DTYPE)


class TurnRunner:
    """One process of the demo: a model, a cache, and the conversation so far."""

    def __init__(self, loaded: LoadedModel, settings: DemoSettings, history: list[int]) -> None:
        """Opens the cache.

        Args:
            loaded: the model and its tokenizer.
            settings: of the demo.
            history: token ids of the conversation so far; empty in the first process.

        Raises:
            HiCacheError: pools or storage backend cannot be opened.
        """
        self._settings = settings
        self._model = loaded.model
        self._tokenizer = loaded.tokenizer
        self._namespace = Namespace(cache_salt=settings.salt)
        self._chat = Chat(loaded.tokenizer, HANDBOOK, history)
        self._cached = CachedModel.open(
            loaded.model,
            HiCacheConfig(**settings.cache),
            device_tokens=_device_tokens(loaded.tokenizer, settings.max_new_tokens),
        )

    def close(self) -> None:
        """Waits until all is stored, then closes the cache."""
        try:
            self._flush()
        finally:
            self._cached.close()

    @property
    def history(self) -> list[int]:
        """Tokens of the first conversation so far."""
        return self._chat.tokens

    def warm_up(self) -> None:
        """A forward without a cache, so that no turn is charged with torch's lazy set-up."""
        generate_greedy(self._model, list(range(100, 100 + WARM_UP_TOKENS)), 2)

    def run(self, plan: TurnPlan, say: Say) -> TurnRecord:
        """One turn: with the cache first, then again without."""
        if plan.flush_device:
            say(Note(f"device tier emptied: {self._empty_device()} pages given up"))
        chat = Chat(self._tokenizer, HANDBOOK) if plan.other_user else self._chat
        prompt = chat.ask(plan.question)
        if self._settings.corrupt and plan.number == CORRUPTED_TURN:
            say(Note(f"page {self._corrupt(prompt)} of the device pool overwritten on purpose"))
        say(Step(f"turn {plan.number} ({plan.label}): {len(prompt)} tokens, with the cache"))
        found, cached = self._with_cache(prompt)
        # What is still being written to host and storage would slow the baseline down.
        if not self._flush():
            say(Note(f"after {FLUSH_TIMEOUT_S:.0f} s, not everything has reached the storage"))
        say(Step(f"turn {plan.number} ({plan.label}): {len(prompt)} tokens, without any cache"))
        baseline = generate_greedy(self._model, prompt, self._settings.max_new_tokens)
        return _record(plan, prompt, cached, found, baseline, chat.answered(found.tokens))

    def _with_cache(self, prompt: list[int]) -> tuple[Generation, CachedTokens]:
        started_at = time.perf_counter()
        with self._cached.turn(prompt, namespace=self._namespace) as turn:
            found = generate_greedy(
                self._model,
                prompt,
                self._settings.max_new_tokens,
                past=turn.past,
                started_at=started_at,
            )
            turn.store([*prompt, *found.tokens])
            return found, turn.cached

    def _flush(self) -> bool:
        return self._cached.cache.flush(FLUSH_TIMEOUT_S)

    def _empty_device(self) -> int:
        """Evicts until nothing is left; under write_back, a page waits for those below it."""
        cache, n_pages = self._cached.cache, self._cached.device_pool.n_pages
        n_given_up = 0
        while n := cache.evict(n_pages):
            n_given_up += n
            self._flush()
        return n_given_up

    def _corrupt(self, prompt: list[int]) -> int:
        """Overwrites a page in the middle of the prompt's prefix with other numbers; its id."""
        cache = self._cached.cache
        pages = cache.match_prefix(prompt, self._namespace, touch=False).device_pages
        page = pages[len(pages) // 2]
        for layers in self._cached.device_pool.buffers:
            for layer in layers:
                layer[page].normal_(std=3.0)
        return page


def _device_tokens(tokenizer: Any, max_new_tokens: int) -> int:
    """Room for both conversations, so that nothing is evicted but on purpose."""
    longest_question = 64
    first_prompt = len(Chat(tokenizer, HANDBOOK).ask(QUESTIONS[0]))
    return 2 * (first_prompt + len(QUESTIONS) * (longest_question + max_new_tokens))


def _record(
    plan: TurnPlan,
    prompt: list[int],
    cached: CachedTokens,
    found: Generation,
    baseline: Generation,
    answer: str,
) -> TurnRecord:
    best, second = baseline.first_logits.topk(2).values.tolist()
    return TurnRecord(
        turn=plan.number,
        pid=os.getpid(),
        label=plan.label,
        tier=plan.tier,
        question=plan.question,
        answer=answer,
        prompt_tokens=len(prompt),
        cached_tokens=asdict(cached),
        new_tokens=len(found.tokens),
        ttft_s=found.ttft_s,
        baseline_ttft_s=baseline.ttft_s,
        decode_tokens_per_s=found.decode_tokens_per_s,
        baseline_decode_tokens_per_s=baseline.decode_tokens_per_s,
        identical=found.tokens == baseline.tokens,
        logits_difference=float((found.first_logits - baseline.first_logits).abs().max()),
        logits_margin=best - second,
    )


def facts_of(loaded: LoadedModel, settings: DemoSettings) -> Facts:
    """What this process runs on."""
    model: Any = loaded.model
    in_force = HiCacheConfig(**settings.cache).resolve().in_force
    return Facts(
        pid=os.getpid(),
        model=loaded.name,
        dtype=str(model.dtype).removeprefix("torch."),
        in_force={
            "page_size": in_force.page_size,
            "io_backend": in_force.hicache_io_backend,
            "mem_layout": in_force.hicache_mem_layout,
            "write_policy": in_force.hicache_write_policy,
        },
    )
