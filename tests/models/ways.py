"""The two ways to run a model with a cache: ``CachedModel``, and the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.controller.controller import Controller
from hicache_core.engine.config import EngineConfig
from hicache_core.engine.engine import Engine
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import Output, Request, SamplingParams
from hicache_core.engine.runner import Past, Runner
from hicache_core.errors import PoolExhausted
from hicache_core.integrations.transformers import CachedModel
from hicache_core.kv.spec import KVSpec
from hicache_core.types import CachedTokens
from tests.models.truth import N_NEW, Answer, Tap

PAGE_SIZE = 16
DEVICE_TOKENS = 2048
CHUNK_TOKENS = 40  # not whole pages
CONTEXT_TOKENS = 1024
PATIENCE_S = 60.0

Cached = tuple[Answer, CachedTokens]


class Asked(Protocol):
    """A model with a cache, whichever way it is run."""

    spec: KVSpec

    def ask(self, prompts: Sequence[list[int]]) -> list[Cached]:
        """Answers prompts, all at once if the way can do that."""
        ...

    def empty_device(self) -> None:
        """Waits until host and storage have everything, and empties the device tier."""
        ...


Way = Callable[[Any, str], AbstractContextManager[Asked]]
"""Opens a model with a new cache over the store of a name."""


def _config(store: str) -> HiCacheConfig:
    return HiCacheConfig(
        page_size=PAGE_SIZE,
        hicache_storage_backend="memory",
        hicache_storage_prefetch_policy="wait_complete",
        hicache_storage_backend_extra_config={"share": store, "prefetch_threshold": 1},
    )


def _empty(cache: Controller) -> None:
    assert cache.flush(PATIENCE_S)
    cache.evict(DEVICE_TOKENS // PAGE_SIZE)
    for index, group in enumerate(cache.parts.groups):
        with suppress(PoolExhausted):  # what requests hold stays, all else has left by then
            cache.free_units(index, cache.allocate_units(index, group.held.device.n_units))


class _InCachedModel:
    """``CachedModel``: one prompt after the other."""

    def __init__(self, cached: CachedModel) -> None:
        self.spec = cached.device_pool.spec
        self._cached = cached

    def ask(self, prompts: Sequence[list[int]]) -> list[Cached]:
        return [self._ask(prompt) for prompt in prompts]

    def _ask(self, prompt: list[int]) -> Cached:
        tap = Tap()
        answer = self._cached.generate(
            prompt, max_new_tokens=N_NEW, do_sample=False, logits_processor=[tap]
        )
        self._cached.cache.check_integrity()
        return Answer(answer.tokens, tap.logits), answer.cached

    def empty_device(self) -> None:
        _empty(self._cached.cache)


@contextmanager
def in_cached_model(model: Any, store: str) -> Iterator[Asked]:
    """Opens a ``CachedModel``.

    Args:
        model: of transformers.
        store: name of its storage, which outlives it.
    """
    with CachedModel.open(model, _config(store), device_tokens=DEVICE_TOKENS) as cached:
        asked = _InCachedModel(cached)
        yield asked
        asked.empty_device()


class _TappedRunner:
    """A Runner that records the logits after each number of tokens.

    Prompts that run at once are told apart by their numbers of tokens.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.logits: dict[int, torch.Tensor] = {}
        self.n_together = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def prefill(self, tokens: Sequence[int], n_past: int, *args: Any, **kwargs: Any) -> Any:
        rows = self._runner.prefill(tokens, n_past, *args, **kwargs)
        self.logits[n_past + len(tokens)] = rows[-1].clone()
        return rows

    def decode(self, batch: Sequence[Past], *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = self._runner.decode(batch, *args, **kwargs)
        self.logits |= {
            past.n_tokens + 1: row.clone() for past, row in zip(batch, logits, strict=True)
        }
        self.n_together = max(self.n_together, len(batch))
        return logits


class _InEngine:
    """The engine: prompts run at once, each of them in chunks."""

    def __init__(self, model: Any, store: str) -> None:
        self.engine = Engine(
            LoadedModel("tiny", model, None),
            _config(store),
            EngineConfig(
                device_tokens=DEVICE_TOKENS,
                chunk_tokens=CHUNK_TOKENS,
                context_length=CONTEXT_TOKENS,
            ),
        )
        self._n_asked = 0

    def open(self) -> None:
        self.engine.open()
        scheduler: Any = self.engine._scheduler  # of its own, so that it keeps groups of layers
        self.spec = scheduler._runner.pool.spec
        self._runner: Any = _TappedRunner(scheduler._runner)
        scheduler._runner = self._runner

    def ask(self, prompts: Sequence[list[int]]) -> list[Cached]:
        self._runner.logits.clear()
        self._runner.n_together = 0
        answers = [_Answering(len(prompt)) for prompt in prompts]
        sampling = SamplingParams(max_new_tokens=N_NEW, temperature=0.0, ignore_eos=True)
        for prompt, answer in zip(prompts, answers, strict=True):
            self._n_asked += 1
            request = Request(f"r{self._n_asked}", tuple(prompt), sampling)
            self.engine.submit(request, answer.take)
        found = [answer.wait(self._runner.logits) for answer in answers]
        assert self._runner.n_together == len(prompts), "they did not run at once"
        return found

    def empty_device(self) -> None:
        self.engine.call(_empty, PATIENCE_S)
        self.engine.call(HiCache.check_integrity, PATIENCE_S)


class _Answering:
    """A request that is being answered."""

    def __init__(self, n_prompt: int) -> None:
        self._n_prompt = n_prompt
        self._tokens: list[int] = []
        self._last: Output | None = None
        self._ended = threading.Event()

    def take(self, output: Output) -> None:
        """Called by the engine."""
        self._tokens.extend(output.new_tokens)
        if output.finish_reason:
            self._last = output
            self._ended.set()

    def wait(self, logits: dict[int, torch.Tensor]) -> Cached:
        """The answer; ``logits`` are those after each number of tokens."""
        assert self._ended.wait(PATIENCE_S), "no answer came"
        assert self._last is not None
        if self._last.error:
            raise RuntimeError(self._last.error)
        rows = [logits[n] for n in range(self._n_prompt, self._n_prompt + len(self._tokens))]
        return Answer(self._tokens, rows), self._last.cached


@contextmanager
def in_engine(model: Any, store: str) -> Iterator[Asked]:
    """Opens an engine.

    Args:
        model: of transformers.
        store: name of its storage, which outlives it.
    """
    way = _InEngine(model, store)
    way.open()
    try:
        yield way
        way.empty_device()
    finally:
        way.engine.close()
