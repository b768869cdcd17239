"""The collector: Prometheus reads the counters of the cache only when it scrapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from hicache_core.errors import ConfigError
from hicache_core.histogram import Histogram
from hicache_core.observe.catalogue import SERIES
from hicache_core.observe.series import Series
from hicache_core.observe.windows import Watch

DEFAULT_PREFIX = "hicache:"
SGLANG_PREFIX = "sglang:"
_PREFIX = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*|")


class CacheCollector(Collector):
    """All series of one cache, for ``CollectorRegistry.register``.

    Threads: ``collect`` may be called on any thread, and on several at once.
    """

    def __init__(
        self,
        watch: Watch,
        *,
        prefix: str = DEFAULT_PREFIX,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            watch: observes the cache, on the scraping thread.
            prefix: of every name: ``hicache:``, ``sglang:``, or another.
            labels: fixed labels of every series, such as ``model_name`` and ``tp_rank``.

        Raises:
            ConfigError: Prometheus does not allow the prefix.
        """
        if not _PREFIX.fullmatch(prefix):
            raise ConfigError(
                f"metrics prefix {prefix!r} cannot begin a Prometheus name; "
                "use letters, digits, _ and :, such as 'hicache:'"
            )
        self._watch = watch
        self._prefix = prefix
        self._labels = dict(labels or {})

    def describe(self) -> Iterator[Metric]:
        """Every series without samples, so that a registry can compare names."""
        for series in _all_series():
            yield self._family(series)

    def collect(self) -> Iterator[Metric]:
        """Every series that the cache has."""
        seen = self._watch.observe()
        fixed = tuple(self._labels.values())
        for series in _all_series():
            family = self._family(series)
            for labels, value in series.read(seen):
                _add(family, fixed + labels, value)
            if family.samples:
                yield family

    def _family(self, series: Series) -> Metric:
        name = self._prefix + series.name
        labels = (*self._labels, *series.labels)
        return _FAMILIES[series.kind](name, series.meaning.replace("`", ""), labels=labels)


_FAMILIES: Mapping[str, type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


def _all_series() -> Iterator[Series]:
    for section in SERIES.values():
        yield from section


def _add(family: Metric, labels: tuple[str, ...], value: float | Histogram) -> None:
    if isinstance(value, Histogram):
        assert isinstance(family, HistogramMetricFamily)
        bounds = [*map(str, value.bounds), "+Inf"]
        buckets = zip(bounds, accumulate(value.counts), strict=True)
        family.add_metric(labels, list(buckets), value.total)
    else:
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
        family.add_metric(labels, value)


def exposition(collector: CacheCollector) -> bytes:
    """The series of one cache as Prometheus text, for a server without a registry of its own."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)
