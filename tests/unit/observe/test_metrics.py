"""Metrics: each series is documented, right, bounded, and absent where nothing is measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from hicache_core.controller.parts import Counters
from hicache_core.errors import ConfigError
from hicache_core.observe.catalogue import SERIES
from hicache_core.observe.metrics import SGLANG_PREFIX, CacheCollector, exposition
from hicache_core.observe.series import MAX_ERROR_KINDS, MAX_NAMESPACES, MAX_WORDS, Series
from hicache_core.observe.snapshot import CacheSnapshot, OperationStatus, PoolStatus, bounded
from hicache_core.observe.windows import Watch
from tests.unit.observe.worlds import backend, full_snapshot, histogram

PAGE = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
ALL = [series for section in SERIES.values() for series in section]
SGLANG_0_5_23 = frozenset(
    """
    cached_tokens_total cache_hit_rate token_usage num_used_tokens kv_available_tokens
    kv_evictable_tokens hicache_host_used_tokens hicache_host_total_tokens evicted_tokens_total
    load_back_tokens_total load_back_bytes_total load_back_duration_seconds
    hicache_backup_tokens_total hicache_backup_bytes_total prefetched_tokens_total
    storage_prefetch_unfulfilled_tokens_total backuped_tokens_total kv_used_tokens
    prefetch_pgs prefetch_bandwidth backup_pgs backup_bandwidth
    eviction_duration_seconds hicache_dropped_tokens_total hicache_backup_duration_seconds
    storage_prefetch_hit_tokens_total
    """.split()  # noqa: SIM905 - a list of this length reads better as text
)
"""Names that stand in SGLang's own collectors, read there by hand."""


def samples(snapshot: CacheSnapshot, prefix: str = "hicache:") -> dict[str, dict[str, float]]:
    """Every sample by name, under its label values, in the order of the labels' names."""
    text = exposition(CacheCollector(Watch(lambda: snapshot), prefix=prefix)).decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(sample.labels[name] for name in sorted(sample.labels))
            assert labels not in found.setdefault(sample.name, {}), "one series, one value"
            found[sample.name][labels] = sample.value
    return found


def row(series: Series) -> str:
    """The line of the docs that a series must have."""
    labels = "; ".join(f"`{name}`: {values}" for name, values in series.labels.items()) or "–"
    cells = [f"`{series.name}`", series.kind, labels, series.unit, series.meaning]
    return "| " + " | ".join([*cells, "yes" if series.sglang else "no"]) + " |"


@pytest.mark.parametrize("series", ALL, ids=lambda series: series.name)
def test_every_series_has_its_line_in_the_docs(series: Series) -> None:
    assert row(series) in PAGE.splitlines()


def test_no_line_of_the_docs_is_of_a_series_that_is_gone() -> None:
    lines = {line for line in PAGE.splitlines() if line.startswith("| `") and line.count("|") == 7}
    assert lines == {row(series) for series in ALL}
    for section in SERIES:
        assert f"## {section}" in PAGE.splitlines()


def test_the_example_of_the_docs_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    code = example + "\nfrom prometheus_client import generate_latest\nprint(generate_latest())"
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert 'hicache:kv_available_tokens{tp_rank="0"} 512.0' in child.stdout


def test_names_of_sglang_are_exactly_those_that_say_so() -> None:
    assert {series.name for series in ALL if series.sglang} == SGLANG_0_5_23
    with_its_prefix = samples(full_snapshot(), SGLANG_PREFIX)
    assert "sglang:cached_tokens_total" in with_its_prefix
    assert all(name.startswith("sglang:") for name in with_its_prefix)


def test_names_follow_prometheus() -> None:
    assert len({series.name for series in ALL}) == len(ALL)
    for series in ALL:
        assert (series.kind == "counter") == series.name.endswith("_total"), series.name
        if series.kind == "histogram" and not series.sglang:
            assert series.name.endswith("_seconds"), series.name
        assert series.meaning.endswith("."), series.name


def test_a_full_cache_exports_every_series() -> None:
    families = CacheCollector(Watch(full_snapshot)).collect()
    exported = {family.name + ("_total" * (family.type == "counter")) for family in families}
    assert exported == {f"hicache:{series.name}" for series in ALL}


def test_every_counter_of_the_controller_is_seen_by_somebody() -> None:
    """A counter that no series reads would be counted for nothing, or the docs miss it."""
    names = {field.name for field in fields(Counters)}
    # In hit_tokens and evicted_pages:
    pools = {"device_hit_tokens", "host_hit_tokens", "storage_hit_tokens", "evicted_host_pages"}
    for name in names - pools:
        without = {key: n for key, n in full_snapshot().counters.items() if key != name}
        assert samples(full_snapshot(counters=without)) != samples(full_snapshot()), name


def test_values_are_those_of_the_snapshot_in_the_unit_of_the_series() -> None:
    snapshot = full_snapshot()
    found = samples(snapshot)
    counters = snapshot.counters
    assert found["hicache:cached_tokens_total"] == {"device": 100, "host": 50, "storage": 25}
    assert found["hicache:backuped_tokens_total"] == {"": counters["stored_pages"] * 16}
    of_groups = 2 << 18  # one unit of each
    loaded = counters["load_back_tokens"]
    assert found["hicache:load_back_bytes_total"] == {"": (loaded << 16) + of_groups}
    assert found["hicache:load_back_tokens_total"] == {"kv": loaded, "swa": 16, "mamba": 1}
    assert found["hicache:num_used_tokens"] == {"": 30 * 16}
    assert found["hicache:token_usage"] == {"": 0.3}
    assert found["hicache:hicache_host_used_tokens"] == {"": 600 * 16}
    assert found["hicache:pool_pages"]["evictable,host"] == 300
    errors = found["hicache:storage_errors_total"]
    assert {labels: n for labels, n in errors.items() if n} == {
        "redis,BackendTimeout,get": 3,
        "redis,BackendFull,set": 1,
        "s3,BackendTimeout,get": 3,
        "s3,BackendFull,set": 1,
    }
    evicted = found["hicache:evicted_pages_total"]
    assert {labels: n for labels, n in evicted.items() if n} == {
        "evicted,device": 11,
        "corrupt,host": 1,
    }


def test_a_counter_is_there_before_its_first_event() -> None:
    """Or a rate would not see that event: a series of one sample has none."""
    calm = backend(breaker_changes={}, operations=(OperationStatus("get", histogram()),))
    found = samples(full_snapshot(backends=(calm,), evicted_pages=()))
    errors = found["hicache:storage_errors_total"]
    assert errors["redis,BackendTimeout,get"] == errors["redis,BackendFull,get"] == 0
    assert set(found["hicache:storage_breaker_changes_total"].values()) == {0}
    assert found["hicache:evicted_pages_total"] == {
        "evicted,device": 0,
        "flushed,device": 0,
        "evicted,host": 0,
        "flushed,host": 0,
        "stored,host": 0,
    }


def test_groups_of_layers_have_units_by_tier_and_state() -> None:
    found = samples(full_snapshot())
    units = {key: n for key, n in found["hicache:group_units"].items() if key.startswith("swa")}
    assert units == {
        "swa,free,device": 8,
        "swa,cached,device": 10,
        "swa,in_use,device": 2,
        "swa,free,host": 80,
        "swa,cached,host": 120,
        "swa,in_use,host": 0,
    }
    assert found["hicache:group_moved_units_total"]["mamba,store"] == 4
    assert found["hicache:group_skipped_units_total"]["mamba,backup"] == 6
    assert found["hicache:group_cut_matches_total"] == {"swa": 9, "mamba": 9}
    evicted = found["hicache:group_evicted_units_total"]
    assert evicted["evicted,swa,host"] == 11
    assert "outside_window,swa,device" in evicted
    assert "outside_window,mamba,device" not in evicted


def test_a_model_with_full_attention_has_no_series_of_groups() -> None:
    found = samples(full_snapshot(groups=()))
    assert not any("group" in name for name in found)


def test_a_breaker_is_in_one_state() -> None:
    states = samples(full_snapshot())["hicache:storage_breaker_state"]
    assert states == {
        "redis,closed": 1,
        "redis,open": 0,
        "redis,half_open": 0,
        "s3,closed": 0,
        "s3,open": 1,
        "s3,half_open": 0,
    }
    bare = samples(full_snapshot(backends=(backend(breaker=""),)))
    assert "hicache:storage_breaker_state" not in bare


def test_histograms_are_cumulative_and_end_with_everything() -> None:
    found = samples(full_snapshot(prefetch_wait_s=histogram(0.0005, 0.01, 0.05, 7.0)))
    name = "hicache:prefetch_wait_seconds"
    buckets = found[f"{name}_bucket"]
    assert buckets == {"0.001": 1, "0.01": 2, "0.1": 3, "1.0": 3, "+Inf": 4}
    assert found[f"{name}_count"] == {"": 4}
    assert found[f"{name}_sum"][""] == pytest.approx(7.0605)


def test_what_nobody_measures_is_absent_not_zero() -> None:
    bare = CacheSnapshot(16, 1 << 20, device=PoolStatus(8, 8, 0, 0, 0))
    found = samples(bare)
    assert "hicache:prefetch_wait_seconds_bucket" not in found
    assert "hicache:hicache_host_total_tokens" not in found
    assert "hicache:backuped_tokens_total" not in found
    assert found["hicache:kv_available_tokens"] == {"": 128}


def test_labels_are_bounded() -> None:
    many = {f"kind_{n}": 1 for n in range(1000)}
    strange = backend(
        operations=(OperationStatus("get", histogram(0.1), many),),
        usage_nbytes={f"{n:016x}": n for n in range(1000)},
    )
    backends = tuple(backend(f"b{n}") for n in range(100))
    found = samples(full_snapshot(backends=(strange,), admission=many, rejected_pages=many))
    assert len(found["hicache:storage_errors_total"]) == MAX_ERROR_KINDS + 1
    assert len(found["hicache:storage_usage_bytes"]) == MAX_NAMESPACES + 1
    assert len(found["hicache:admission_decisions_total"]) == MAX_WORDS + 1
    assert sum(found["hicache:storage_errors_total"].values()) == 1000
    assert f"redis,{999:016x}" in found["hicache:storage_usage_bytes"]
    assert len(samples(full_snapshot(backends=backends))["hicache:storage_retries_total"]) == 8


def test_a_counter_never_shrinks_when_labels_become_too_many() -> None:
    counts: dict[str, int] = {}
    before: dict[str, int] = {}
    for n in range(10):
        counts[f"kind_{n}"] = n + 1
        after = bounded(counts, 4)
        assert all(after[label] >= value for label, value in before.items())
        before = after
    assert sum(before.values()) == 55


def test_fixed_labels_stand_on_every_series() -> None:
    collector = CacheCollector(Watch(full_snapshot), labels={"tp_rank": "3", "model_name": "m"})
    for family in collector.collect():
        for sample in family.samples:
            assert sample.labels["tp_rank"] == "3"
            assert sample.labels["model_name"] == "m"


def test_a_prefix_that_prometheus_refuses_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="'my-cache:'"):
        CacheCollector(Watch(full_snapshot), prefix="my-cache:")


def test_two_caches_of_one_prefix_do_not_share_a_registry() -> None:
    registry = CollectorRegistry()
    registry.register(CacheCollector(Watch(full_snapshot)))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(CacheCollector(Watch(full_snapshot)))
    registry.register(CacheCollector(Watch(full_snapshot), prefix="draft:"))


def test_scrapes_from_several_threads_agree() -> None:
    collector = CacheCollector(Watch(full_snapshot, clock=lambda: 0.0))
    texts: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: texts.append(exposition(collector))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(texts)) == 1
    assert len(texts) == 4


def test_a_snapshot_needs_no_extra() -> None:
    code = (
        "import sys, hicache_core.observe.snapshot as s\n"
        "extras = {'prometheus_client', 'zmq', 'msgpack', 'opentelemetry', 'torch', 'pydantic'}\n"
        "sys.exit(not extras.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("module", ["events", "http", "metrics", "snapshot", "tracing", "windows"])
def test_nothing_that_observes_imports_torch(module: str) -> None:
    code = f"import sys, hicache_core.observe.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
