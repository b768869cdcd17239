"""EngineConfig: how much an engine runs at once; EngineStatus: what it does now."""

from __future__ import annotations

from dataclasses import dataclass

from hicache_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of the engine; those of the cache are a ``HiCacheConfig``.

    Attributes:
        max_running: maximum number of sequences that run at once.
        max_waiting: maximum number of queued requests; further ones get ``QueueFull``.
        chunk_tokens: maximum number of prompt tokens computed in one step.
        device_tokens: room of the device tier in tokens; None for what ``mem_fraction_static``
            leaves on a GPU, and on a CPU for ``CPU_DEVICE_TOKENS`` or one context, the larger.
        context_length: maximum tokens of prompt and answer together; None for the model's own.
        mem_fraction_static: part of a GPU's memory for weights and device tier together.
        offload_stride: while a sequence is decoded, its new pages go to the cache, and so to host
            and storage, each time it has this many; 0 stores them at the end only.
        stall_timeout_s: a request that makes no progress for this long is reported as stalled; set
            it longer than any step takes.
    """

    max_running: int = 8
    max_waiting: int = 256
    chunk_tokens: int = 512
    device_tokens: int | None = None
    context_length: int | None = None
    mem_fraction_static: float = 0.85
    offload_stride: int = 0
    stall_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that is out of range."""
        for name in ("max_running", "max_waiting", "chunk_tokens"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("device_tokens", "context_length"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1")
        in_range = 0 < self.mem_fraction_static < 1
        self._check("mem_fraction_static", in_range, "between 0 and 1")
        self._check("stall_timeout_s", self.stall_timeout_s > 0, "above 0")
        self._check("offload_stride", self.offload_stride >= 0, "at least 0")

    def _check(self, name: str, is_well: bool, allowed: str) -> None:
        if not is_well:
            raise ConfigError(f"{name} is {getattr(self, name)}; it must be {allowed}")


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One look at an engine.

    Attributes:
        waiting: requests that wait.
        running: requests that are being computed.
        n_slots: tokens that the device tier holds.
        used_slots: tokens of the device pages that running requests hold.
        tokens_per_s: new tokens, over the last ten seconds.
        prefill_tokens_per_s: prompt tokens computed, over the last ten seconds.
        finished: requests that have ended since the start, for any reason.
        aborted: requests among them whose client left.
        failed: requests among them that ended with an error.
        preempted: how often a running request went back to the queue for lack of pages.
        context_length: maximum tokens of prompt and answer together.
        error: why the engine stopped; empty while it runs.
        stalled: which request makes no progress, for how long; empty while all of them do.
    """

    waiting: int
    running: int
    n_slots: int
    used_slots: int
    tokens_per_s: float
    prefill_tokens_per_s: float
    finished: int
    aborted: int
    failed: int
    preempted: int
    context_length: int
    error: str
    stalled: str = ""
