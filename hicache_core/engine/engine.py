"""Engine: a model, its cache, and the thread that runs both; the front that others call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from hicache_core.build import HiCache
from hicache_core.config import HiCacheConfig
from hicache_core.engine.config import EngineConfig, EngineStatus
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import Output, Request
from hicache_core.pools.device import DevicePool
from hicache_core.ranks import RankGroup

__all__ = ["Engine", "EngineConfig", "EngineStatus"]

T = TypeVar("T")
Clock = Callable[[], float]
OnOutput = Callable[[Output], None]


class Engine:
    """Answers requests with a model whose prefixes come from HiCache.

    One thread of its own runs everything between ``open`` and ``close``. All public methods may be
    called from any thread but that one.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache_config: HiCacheConfig,
        config: EngineConfig,
        *,
        ranks: RankGroup | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Keeps its arguments; ``open`` starts."""
        raise NotImplementedError

    def open(self) -> None:
        """Builds pools and cache, and starts the thread.

        Raises:
            SpecError, NotEnoughMemory, ConfigError, PluginError, BackendError: as ``HiCache``.
        """
        raise NotImplementedError

    def close(self, timeout_s: float = 10.0) -> None:
        """Takes no more requests, finishes those it has, drains backups; may be called twice.

        What is not finished when ``timeout_s`` is over ends with ``abort``; the cache then gets as
        long once more for its writes.
        """
        raise NotImplementedError

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Queues a request; returns at once.

        Args:
            request: what to answer.
            on_output: called on the engine's thread, at most once a step, the last time with a
                ``finish_reason``. It must neither block nor raise.

        Raises:
            QueueFull: ``max_waiting`` requests wait already.
            InvalidTokens: the prompt is empty, no tokens of this model, or longer than context or
                device pool.
            ConfigError: sampling parameters out of range.
            UseAfterClose: the engine is closed, closing, or has stopped.
        """
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """Ends a request with ``abort``, whatever its state; of one that has ended, nothing."""
        raise NotImplementedError

    def call(self, work: Callable[[HiCache], T], timeout_s: float) -> T:
        """Runs ``work`` on the engine's thread, between two steps; its result.

        Raises:
            TimeoutError: it was not done in time; it may still be done later.
            UseAfterClose: the engine is closed.
            Whatever ``work`` raises.
        """
        raise NotImplementedError

    @property
    def cache(self) -> HiCache:
        """The cache. Only its ``snapshot`` and ``explain`` are for other threads: see ``call``."""
        raise NotImplementedError

    @property
    def pool(self) -> DevicePool:
        """The device pages. Their memory may be read by other threads while locked by the caller."""
        raise NotImplementedError

    def status(self) -> EngineStatus:
        """What the engine does now."""
        raise NotImplementedError
