"""RequestMetrics: counts and times of requests, and the series made of them."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from hicache_core.engine.request import Output
from hicache_core.histogram import Distribution

if TYPE_CHECKING:
    from hicache_core.engine.config import EngineStatus

_BOUNDS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
# Those of SGLang, so that a query for a bucket finds it.
_QUEUE_BOUNDS_S = (
    0.0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0, 200.0, 300.0, 400.0, 500.0, 600.0, 700.0, 800.0,
    900.0, 1000.0, 1200.0, 1400.0, 1600.0, 1800.0, 2000.0, 2500.0, 3000.0,
)  # fmt: skip
_TOKEN_BOUNDS_S = (
    0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1, 0.2,
    0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0,
)  # fmt: skip
_MAX_TIMES = 1024
FINISH_REASONS = ("stop", "length", "abort", "error")


class RequestMetrics:
    """Counts outputs and times of requests. The engine's thread writes, any thread reads.

    Attributes:
        times: of the newest requests that have ended: ``ttft_s`` and ``total_s``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing has happened; ``clock`` is in seconds."""
        self._clock = clock
        self._last_s: dict[str, float] = {}  # when each request had its latest token
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.finished = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self.ttft_s = Distribution(_BOUNDS_S)
        self.total_s = Distribution(_BOUNDS_S)
        self.queue_s = Distribution(_QUEUE_BOUNDS_S)
        self.token_s = Distribution(_TOKEN_BOUNDS_S)
        self.output_token_s = Distribution(_TOKEN_BOUNDS_S)
        self.times: OrderedDict[str, dict[str, float]] = OrderedDict()

    def take(self, output: Output) -> None:
        """Counts an output; on the engine's thread."""
        if output.new_tokens:
            self._count_tokens(output)
        if output.finish_reason is None:
            return
        self._last_s.pop(output.request_id, None)
        self.finished[output.finish_reason] += 1
        self.prompt_tokens += output.prompt_tokens
        times, seconds = output.times, {}
        if times.first_scheduled:
            self.queue_s.add(times.first_scheduled - times.arrived)
        if times.first_token:
            seconds["ttft_s"] = times.first_token - times.arrived
            self.ttft_s.add(seconds["ttft_s"])
        if times.finished:
            seconds["total_s"] = times.finished - times.arrived
            self.total_s.add(seconds["total_s"])
            self._count_pace(output)
        self.times[output.request_id] = seconds
        if len(self.times) > _MAX_TIMES:
            self.times.popitem(last=False)

    def _count_tokens(self, output: Output) -> None:
        now_s, n_new = self._clock(), len(output.new_tokens)
        self.new_tokens += n_new
        before_s = self._last_s.get(output.request_id)
        self._last_s[output.request_id] = now_s
        if before_s is not None:
            for _ in range(n_new):
                self.token_s.add((now_s - before_s) / n_new)

    def _count_pace(self, output: Output) -> None:
        """Counts the mean time between the tokens of an answer that came whole."""
        first_s, n_gaps = output.times.first_token, output.completion_tokens - 1
        seconds = output.times.finished - first_s
        is_whole = output.finish_reason in ("stop", "length")
        if is_whole and first_s and n_gaps > 0 and seconds > 0:
            self.output_token_s.add(seconds / n_gaps)


class ServerCollector(Collector):
    """The server's own series, beside those of the cache; named as SGLang names them."""

    def __init__(
        self,
        metrics: RequestMetrics,
        status: Callable[[], EngineStatus],
        prefix: str,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            metrics: what is counted.
            status: what the engine does now.
            prefix: before every name.
            labels: on every series, such as ``model_name``.
        """
        self._metrics = metrics
        self._status = status
        self._prefix = prefix
        self._names = tuple(labels or {})
        self._values = tuple((labels or {}).values())

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        status, metrics = self._status(), self._metrics
        yield from self._gauges(status)
        yield from self._counters(status)
        for name, meaning, times in (
            (
                "time_to_first_token_seconds",
                "Seconds from arrival to the first token.",
                metrics.ttft_s,
            ),
            (
                "e2e_request_latency_seconds",
                "Seconds from arrival to the last token.",
                metrics.total_s,
            ),
            (
                "queue_time_seconds",
                "Seconds from arrival until a request ran, of ended requests.",
                metrics.queue_s,
            ),
            (
                "inter_token_latency_seconds",
                "Seconds between two tokens of an answer.",
                metrics.token_s,
            ),
            (
                "request_time_per_output_token_seconds",
                "Mean seconds between two tokens of each answer that was not aborted.",
                metrics.output_token_s,
            ),
        ):
            yield self._times(name, meaning, times)

    def _gauges(self, status: EngineStatus) -> Iterator[Metric]:
        for name, meaning, value in (
            ("num_running_reqs", "Requests being computed.", status.running),
            ("num_queue_reqs", "Queued requests.", status.waiting),
            ("engine_stalled", "1 while a request makes no progress.", bool(status.stalled)),
            ("max_total_num_tokens", "Tokens that the device pool can hold.", status.n_slots),
            (
                "gen_throughput",
                "Generated tokens per second, over the last ten seconds.",
                status.tokens_per_s,
            ),
        ):
            gauge = GaugeMetricFamily(self._prefix + name, meaning, labels=self._names)
            gauge.add_metric(self._values, value)
            yield gauge

    def _counters(self, status: EngineStatus) -> Iterator[Metric]:
        metrics = self._metrics
        for name, meaning, count in (
            ("prompt_tokens", "Prompt tokens of ended requests.", metrics.prompt_tokens),
            ("generation_tokens", "Generated tokens.", metrics.new_tokens),
            (
                "num_aborted_requests",
                "Requests that ended because their client left or the server ended.",
                metrics.finished["abort"],
            ),
            (
                "num_retracted_requests",
                "How often a running request went back to the queue for lack of pages.",
                status.preempted,
            ),
        ):
            counter = CounterMetricFamily(self._prefix + name, meaning, labels=self._names)
            counter.add_metric(self._values, count)
            yield counter
        requests = CounterMetricFamily(
            self._prefix + "num_requests",
            "Ended requests by finish reason.",
            labels=[*self._names, "finish_reason"],
        )
        for reason, n in sorted(metrics.finished.items()):
            requests.add_metric([*self._values, reason], n)
        yield requests

    def _times(self, name: str, meaning: str, times: Distribution) -> Metric:
        histogram = times.histogram()
        bounds = [*map(str, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family = HistogramMetricFamily(self._prefix + name, meaning, labels=self._names)
        family.add_metric(self._values, buckets, histogram.total)
        return family
