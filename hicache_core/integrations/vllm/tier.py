"""A secondary tier of vLLM's offloading: rows of its host memory go to a backend and come back."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from hicache_core.config.sources import read_inline
from hicache_core.integrations.foreign.opening import open_store
from hicache_core.integrations.foreign.store import Answer
from hicache_core.integrations.vllm.keys import (
    SEED_VARIABLE,
    check_version,
    hash_nbytes_of,
    keys_agree,
    offload_keys,
    tier_namespace,
)
from hicache_core.integrations.vllm.logs import log_where_vllm_does
from hicache_core.integrations.vllm.verdicts import Verdicts
from hicache_core.types import Page

logger = logging.getLogger(__name__)

REFUSED_CHUNKS = "hicache:refused_chunks"
STORE_AVAILABLE = "hicache:store_available"

_STATS_INTERVAL_S = 1.0
_LOOKUPS = {True: LookupResult.HIT, False: LookupResult.MISS, None: LookupResult.RETRY}


@dataclass(frozen=True, slots=True)
class _Moved:
    """A load or store whose call has ended: nothing touches its rows any more."""

    job: TransferJob
    answer: Answer


class HiCacheTier(SecondaryTierManager):
    """Stores rows of vLLM's host memory in a backend, and loads them from it.

    Named in ``secondary_tiers`` of ``TieringOffloadingSpec``. No call waits for the store. A page
    that the store lost, damaged or does not deliver is a miss of that page alone.

    vLLM asks chunk by chunk. The first question of a chunk answers ``RETRY``; the questions of a
    scheduler step go to the store together when the step ends, and later steps find the answers
    (``Verdicts``). ``HIT_PENDING`` is vLLM's to say: it keeps the rows of a running load itself.

    Threads: vLLM's scheduler, or one at a time under the lock of its manager. Threads of the store
    only append to two queues.
    """

    medium: ClassVar[Medium] = Medium.STORAGE
    tolerates_off_thread_polling: ClassVar[bool] = False

    def __init__(  # noqa: PLR0913  # vLLM passes every setting as a keyword
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        backend: str,
        backend_config: Mapping[str, object] | str | None = None,
        locality: str | None = None,
        enable_kv_events: bool = False,
        variant: str = "",
    ) -> None:
        """Opens the backend.

        Args:
            offloading_spec: vLLM's; its ``config`` says what a row holds.
            primary_kv_view: vLLM's host memory, one row for each chunk.
            tier_type: the name of the tier in vLLM's logs and metrics.
            backpressure_detector: vLLM's, if one is configured.
            backend: an installed backend, ``chain`` or ``dynamic``.
            backend_config: its settings, and those of its guard under ``guard``; a mapping, JSON
                text or ``@file``.
            locality: ``LOCAL`` or ``REMOTE``, for requests that name the tiers to load from.
            enable_kv_events: whether stored chunks are announced as KV events, if vLLM emits them.
            variant: what else decides a chunk's bytes; vLLM tells only the model's name and dtype.

        Raises:
            ConfigError: a setting, the version of vLLM or its memory does not fit.
            PluginError: the backend is not installed or does not load.
            BackendError: the store cannot be opened.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        log_where_vllm_does()
        check_version(vllm.__version__)
        namespace = tier_namespace(
            offloading_spec.config,
            version=vllm.__version__,
            single_copy=offloading_spec.replicated_layout,
            variant=variant,
        )
        self.locality = Locality(locality) if locality is not None else None
        announces = enable_kv_events and offloading_spec.kv_events_config.enable_kv_cache_events
        self._events: list[OffloadingEvent] | None = [] if announces else None
        self._backend = backend
        self._row_nbytes = self.block_size_bytes
        self._page_nbytes = namespace.object_nbytes
        self._memory = primary_kv_view.cast("B")
        self._verdicts = Verdicts(time.monotonic)
        self._keys_agree: bool | None = None  # unknown until vLLM shows a key
        self._answers: deque[tuple[list[bytes], Answer]] = deque()
        self._moved: deque[_Moved] = deque()
        self._n_moving = 0
        self._still = threading.Condition()  # and the lock of _n_moving
        self._refused: Mapping[str, int] = {}  # as last reported
        self._next_stats_s = 0.0
        settings = read_inline(backend_config or {}, what="backend_config: ")
        self._store = open_store(backend, settings, object_nbytes=namespace.object_nbytes)
        self._namespace = self._store.describe(namespace)
        self._store.register_memory([self._memory])

    # Questions

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        # docstring inherited
        return RequestOffloadingContext()

    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        # docstring inherited
        if not self._can_share(key):
            return LookupResult.MISS
        if self._answers:
            self._take_answers()
        return _LOOKUPS[self._verdicts.look(key, req_context.req_id)]

    def on_schedule_end(self, context: Any) -> None:
        # docstring inherited
        self._take_answers()
        keys = self._verdicts.take_questions()
        if keys:
            self._store.submit_exists(
                offload_keys(self._namespace, keys),
                lambda answer: self._answers.append((keys, answer)),
            )

    def on_request_finished(self, req_context: Any) -> None:
        # docstring inherited
        self._take_answers()
        self._verdicts.forget(req_context.req_id)

    def _take_answers(self) -> None:
        while self._answers:
            keys, answer = self._answers.popleft()
            self._verdicts.answer(keys, answer.mask)

    def _can_share(self, key: bytes) -> bool:
        """Returns whether other processes give blocks the same keys; warns once if not."""
        if self._keys_agree is None:
            self._keys_agree = keys_agree(hash_nbytes_of(key), os.environ)
            if not self._keys_agree:
                logger.warning(
                    "HiCache stores nothing: vLLM's block hashes start from a random seed, and no "
                    "other process would find them; use --prefix-caching-hash-algo sha256, or "
                    "set %s",
                    SEED_VARIABLE,
                )
        return self._keys_agree

    # Transfers

    def submit_store(self, job_metadata: TransferJob) -> None:
        # docstring inherited
        keys = list(job_metadata.keys)
        self._begin()
        if keys and not self._can_share(keys[0]):
            self._end(_Moved(job_metadata, Answer([False] * len(keys))))
            return
        self._store.submit_write(
            offload_keys(self._namespace, keys),
            self._pages(job_metadata),
            lambda answer: self._end(_Moved(job_metadata, answer)),
        )

    def submit_load(self, job_metadata: TransferJob) -> None:
        # docstring inherited
        self._begin()
        self._store.submit_read(
            offload_keys(self._namespace, list(job_metadata.keys)),
            self._pages(job_metadata),
            lambda answer: self._end(_Moved(job_metadata, answer)),
        )

    def get_finished_jobs(self) -> Iterable[JobResult]:
        # docstring inherited
        self._take_answers()
        results = []
        while self._moved:
            results.append(self._result(self._moved.popleft()))
        return results

    def has_pending_work(self) -> bool:
        # docstring inherited
        return self._n_moving > 0 or bool(self._moved)

    def drain_jobs(self) -> None:
        # docstring inherited
        with self._still:
            self._still.wait_for(lambda: self._n_moving == 0)

    def _pages(self, job: TransferJob) -> list[Page]:
        memory, row_nbytes, page_nbytes = self._memory, self._row_nbytes, self._page_nbytes
        starts = [row * row_nbytes for row in job.chunk_ids.tolist()]
        return [(memory[start : start + page_nbytes],) for start in starts]

    def _begin(self) -> None:
        with self._still:
            self._n_moving += 1

    def _end(self, moved: _Moved) -> None:
        """Queues a result; called on threads of the store."""
        with self._still:
            self._moved.append(moved)
            self._n_moving -= 1
            self._still.notify_all()

    def _result(self, moved: _Moved) -> JobResult:
        job, answer = moved.job, moved.answer
        good = [key for key, ok in zip(job.keys, answer.mask, strict=True) if ok]
        bad = [key for key, ok in zip(job.keys, answer.mask, strict=True) if not ok]
        self._verdicts.note(good, present=True)
        if job.is_promotion:
            self._verdicts.note(bad, present=False)
        elif good and self._events is not None:
            event = OffloadingEvent(good, self.medium, removed=False, locality=self.locality)
            self._events.append(event)
        return JobResult(
            job.job_id,
            success=not bad,
            successful_keys=good if bad and good and job.is_promotion else None,
            transfer_time=answer.elapsed_s,
            transfer_bytes=len(good) * self._page_nbytes,
        )

    # What others see

    def take_events(self) -> Iterable[OffloadingEvent]:
        # docstring inherited
        events = self._events or []
        if events:
            self._events = []
        return events

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        # docstring inherited
        return {
            REFUSED_CHUNKS: OffloadingCounterMetadata(
                "Chunks that the store delivered and HiCache refused, by what was wrong.",
                labelnames=("tier", "kind"),
            ),
            STORE_AVAILABLE: OffloadingGaugeMetadata(
                "1 if the store is called, 0 while its circuit breaker is open.",
                labelnames=("tier", "store"),
            ),
        }

    def get_stats(self) -> OffloadingConnectorStats | None:
        # docstring inherited
        now = time.monotonic()
        if now < self._next_stats_s:
            return None
        self._next_stats_s = now + _STATS_INTERVAL_S
        stats = OffloadingConnectorStats()
        refused = self._store.rejected()
        for kind, count in refused.items():
            new = count - self._refused.get(kind, 0)
            if new:
                stats.increase_counter(REFUSED_CHUNKS, new, (self.tier_type, kind))
        self._refused = refused
        for store in self._store.statuses():
            available = int(store.breaker != "open")
            stats.set_gauge(STORE_AVAILABLE, available, (self.tier_type, store.name))
        return stats

    @classmethod
    def config_info_keys(cls, tier_config: dict[str, Any]) -> tuple[str, ...]:
        """Names the labels of ``config_info``; vLLM 0.33 calls it."""
        return ("hicache_backend",)

    def config_info(self) -> Mapping[str, str]:
        """Labels of vLLM's metric of its configuration; vLLM 0.33 calls it."""
        return {"hicache_backend": self._backend}

    def shutdown(self) -> None:
        """Closes the store; ends running calls, or leaves one that hangs behind."""
        self._store.close()
        if self._n_moving == 0:
            self._memory.release()
