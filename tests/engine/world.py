"""The smallest world of the engine: a tiny model, a tokenizer of bytes, and plain generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.config import EngineConfig
from hicache_core.engine.detokenize import TextStream
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.page_table import PageTable
from hicache_core.engine.request import Output, Request, SamplingParams, WantedLogprobs
from hicache_core.engine.runner import Runner
from hicache_core.engine.sampling import Sampler
from hicache_core.engine.scheduler import Scheduler
from hicache_core.engine.task import Task
from hicache_core.engine.units import SequenceUnits
from hicache_core.integrations.model_check import check_model
from hicache_core.integrations.model_spec import kv_spec_of
from hicache_core.integrations.transformers import fingerprint_of_model
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.types import Namespace
from tests.page_path.tiny_models import prompt_of, tiny_model

PAGE_SIZE = 4
EOS = 511


class ByteTokenizer:
    """Token n < 256 is byte n; 256 to 499 are texts; from 500 on, special tokens."""

    eos_token_id = EOS

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        """As transformers: bytes that are no character yet become U+FFFD."""
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return b"".join(self._bytes_of(token) for token in ids).decode(errors="replace")

    @staticmethod
    def _bytes_of(token: int) -> bytes:
        if token < 256:
            return bytes([token])
        return b"" if token >= 500 else f"<{token}>".encode()


@functools.cache
def model_of(architecture: str = "llama") -> LoadedModel:
    """A tiny model that never ends by itself."""
    return LoadedModel(architecture, tiny_model(architecture), None)


def with_text(loaded: LoadedModel) -> LoadedModel:
    """The same with a tokenizer."""
    return LoadedModel(loaded.name, loaded.model, ByteTokenizer())


def plain(loaded: LoadedModel, prompt: Sequence[int], n_new: int) -> tuple[int, ...]:
    """What the model answers without any cache of ours, greedily."""
    ids = torch.tensor([list(prompt)])
    output = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False
    )
    return tuple(output[0, len(prompt) :].tolist())


def cache_config(**changes: Any) -> HiCacheConfig:
    """Small pages, and storage asked for a single one of them."""
    extra = {"prefetch_threshold": 1, **changes.pop("extra", {})}
    return HiCacheConfig(
        **{
            "page_size": PAGE_SIZE,
            "hicache_storage_prefetch_policy": "wait_complete",
            "hicache_storage_backend_extra_config": extra,
            **changes,
        }
    )


def greedy(n_new: int = 8, **changes: Any) -> SamplingParams:
    """The most probable token each time."""
    return SamplingParams(max_new_tokens=n_new, temperature=0.0, **changes)


class SteppedEngine:
    """A scheduler without a thread: requests go in, steps are made by the test.

    After each step everything that must hold is checked.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: HiCache,
        pool: DevicePool,
        config: EngineConfig,
        snapshot_interval: int = 1024,
    ) -> None:
        """Joins the parts."""
        self.loaded = loaded
        self.cache = cache
        self.pool = pool
        self.outputs: dict[str, list[Output]] = {}
        self.scheduler = Scheduler(
            cache,
            Runner(loaded.model, pool),
            config,
            n_pages=pool.n_pages,
            clock=lambda: float(self._n_steps + 1),
        )
        self._units = SequenceUnits(
            cache,
            pool.spec.groups,
            snapshot_interval,
            keeps_answers=check_model(loaded.model).decodes_alike,
        )
        self._n_steps = 0
        self._n_arrived = 0

    def ask(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        namespace: Namespace | None = None,
        priority: int = 0,
        logprobs: WantedLogprobs | None = None,
    ) -> str:
        """Queues a request; its id."""
        self._n_arrived += 1
        request_id = request_id or f"r{self._n_arrived}"
        request = Request(
            request_id,
            tuple(prompt),
            sampling or greedy(),
            namespace or Namespace(),
            priority,
            logprobs=logprobs,
        )
        self.outputs[request_id] = []
        params = request.sampling
        eos = () if self.loaded.tokenizer is None else (EOS,)
        self.scheduler.add(
            Task(
                request,
                self._n_arrived,
                self.outputs[request_id].append,
                PageTable(self.cache, request.namespace, priority, self._units.another()),
                Sampler(params, params.seed or 0, eos),
                TextStream(self.loaded.tokenizer, params.stop),
            )
        )
        return request_id

    def step(self) -> None:
        """One step, and the invariants after it."""
        self._n_steps += 1
        before = {request_id: len(all_) for request_id, all_ in self.outputs.items()}
        if not self.scheduler.step():
            self.cache.wait(0.001)
        self.cache.check_integrity()
        for request_id, outputs in self.outputs.items():
            assert len(outputs) - before.get(request_id, 0) <= 1, "more than one output in a step"
            assert all(output.finish_reason is None for output in outputs[:-1])

    def run(self, max_steps: int = 20000) -> None:
        """Steps until nothing waits or runs."""
        for _ in range(max_steps):
            if not self.is_busy:
                return
            self.step()
        raise AssertionError(f"still busy after {max_steps} steps")

    def run_until(self, condition: Callable[[], bool], max_steps: int = 20000) -> None:
        """Steps until ``condition`` holds."""
        for _ in range(max_steps):
            if condition():
                return
            self.step()
        raise AssertionError(f"it did not happen in {max_steps} steps")

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.is_busy

    def tokens(self, request_id: str) -> tuple[int, ...]:
        """The answer so far."""
        return tuple(token for out in self.outputs[request_id] for token in out.new_tokens)

    def text(self, request_id: str) -> str:
        """The text so far."""
        return "".join(output.text for output in self.outputs[request_id])

    def last(self, request_id: str) -> Output:
        """The last output."""
        return self.outputs[request_id][-1]


@contextmanager
def stepped_engine(
    loaded: LoadedModel | None = None,
    *,
    n_pages: int = 64,
    n_units: int | None = None,
    cache: HiCacheConfig | None = None,
    spec_of: Callable[[Any, str], KVSpec] = kv_spec_of,
    **config: Any,
) -> Iterator[SteppedEngine]:
    """One with a cache of its own; at the end, no page may be held by anybody but the tree.

    Each group has ``n_units`` units, or as many as there are full pages.
    """
    loaded = loaded or model_of()
    cache_settings = cache or cache_config()
    spec = spec_of(loaded.model, fingerprint_of_model(loaded.model))
    units = [n_units or n_pages] * len(spec.groups)
    pool = DevicePool.with_groups(spec, cache_settings.page_size, n_pages, units)
    with HiCache(cache_settings, spec, pool) as opened:
        interval = cache_settings.state_snapshot_interval
        made = SteppedEngine(loaded, opened, pool, EngineConfig(**config), interval)
        yield made
        made.scheduler.abort_all()


__all__ = [
    "SteppedEngine",
    "cache_config",
    "greedy",
    "model_of",
    "plain",
    "prompt_of",
    "stepped_engine",
    "with_text",
]
