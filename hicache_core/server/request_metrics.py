"""RequestMetrics: counts and times of requests, and the series made of them."""

from __future__ import annotations

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
_MAX_TIMES = 1024
FINISH_REASONS = ("stop", "length", "abort", "error")


class RequestMetrics:
    """Counts outputs and times of requests. The engine's thread writes, any thread reads.

    Attributes:
        times: of the newest requests that have ended: ``ttft_s`` and ``total_s``.
    """

    def __init__(self) -> None:
        """Nothing has happened."""
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.finished = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self.ttft_s = Distribution(_BOUNDS_S)
        self.total_s = Distribution(_BOUNDS_S)
        self.times: OrderedDict[str, dict[str, float]] = OrderedDict()

    def take(self, output: Output) -> None:
        """Counts an output; on the engine's thread."""
        self.new_tokens += len(output.new_tokens)
        if output.finish_reason is None:
            return
        self.finished[output.finish_reason] += 1
        self.prompt_tokens += output.prompt_tokens
        times, seconds = output.times, {}
        if times.first_token:
            seconds["ttft_s"] = times.first_token - times.arrived
            self.ttft_s.add(seconds["ttft_s"])
        if times.finished:
            seconds["total_s"] = times.finished - times.arrived
            self.total_s.add(seconds["total_s"])
        self.times[output.request_id] = seconds
        if len(self.times) > _MAX_TIMES:
            self.times.popitem(last=False)


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
        metrics, status = self._metrics, self._status()
        gauges = {
            "num_running_reqs": ("Requests being computed.", status.running),
            "num_queue_reqs": ("Queued requests.", status.waiting),
            "engine_stalled": ("1 while a request makes no progress.", bool(status.stalled)),
            "gen_throughput": (
                "Generated tokens per second, over the last ten seconds.",
                status.tokens_per_s,
            ),
        }
        for name, (meaning, value) in gauges.items():
            gauge = GaugeMetricFamily(self._prefix + name, meaning, labels=self._names)
            gauge.add_metric(self._values, value)
            yield gauge
        counters = {
            "prompt_tokens": ("Prompt tokens of ended requests.", metrics.prompt_tokens),
            "generation_tokens": ("Generated tokens.", metrics.new_tokens),
        }
        for name, (meaning, count) in counters.items():
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
        yield self._times(
            "time_to_first_token_seconds",
            "Seconds from arrival to the first token.",
            metrics.ttft_s,
        )
        yield self._times(
            "e2e_request_latency_seconds",
            "Seconds from arrival to the last token.",
            metrics.total_s,
        )

    def _times(self, name: str, meaning: str, times: Distribution) -> Metric:
        histogram = times.histogram()
        bounds = [*map(str, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family = HistogramMetricFamily(self._prefix + name, meaning, labels=self._names)
        family.add_metric(self._values, buckets, histogram.total)
        return family
