"""The dashboard: every query names series and labels that the collector really exports."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hicache_core.observe.catalogue import SERIES
from hicache_core.observe.http import StatusPages, StatusServer
from hicache_core.observe.metrics import DEFAULT_PREFIX, SGLANG_PREFIX, CacheCollector, exposition
from hicache_core.observe.snapshot import CacheSnapshot, EventsStatus, OperationStatus
from hicache_core.observe.windows import Watch
from tests.unit.observe.worlds import backend, full_snapshot, histogram, transfers

FILE = Path(__file__).parents[3] / "docs" / "grafana" / "hicache.json"
DASHBOARD = json.loads(FILE.read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
OF_PROMETHEUS = {"instance", "job", "le"}
"""Labels that a scrape or a histogram adds."""
PATIENCE_S = 90.0


def filled(query: str, prefix: str = DEFAULT_PREFIX) -> str:
    """A query as Grafana sends it."""
    text = query.replace("${prefix}", prefix).replace("$instance", ".*")
    return text.replace("$__rate_interval", "30s")


def selectors(query: str) -> list[tuple[str, set[str]]]:
    """The series of a filled query, each with the labels that are matched."""
    found = re.findall(r"([A-Za-z_]+:[A-Za-z0-9_:]+)(?:\{([^}]*)\})?", query)
    return [(name, set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", inner))) for name, inner in found]


def exported(prefix: str) -> dict[str, set[str]]:
    """Names and labels in the real exposition of a full cache."""
    text = exposition(CacheCollector(Watch(full_snapshot), prefix=prefix)).decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


@pytest.mark.parametrize("prefix", [DEFAULT_PREFIX, SGLANG_PREFIX])
@pytest.mark.parametrize("query", QUERIES)
def test_a_query_names_series_and_labels_that_exist(query: str, prefix: str) -> None:
    there = exported(prefix)
    text = filled(query, prefix)
    assert "$" not in text
    asked = selectors(text)
    assert asked, "a query without a series"
    for name, labels in asked:
        assert name in there, name
        assert labels <= there[name] | OF_PROMETHEUS, name
    for group in re.finditer(r"by \(([^)]*)\)", text):
        name, _ = selectors(text[group.end() :])[0]
        assert set(re.findall(r"\w+", group[1])) <= there[name] | OF_PROMETHEUS, name


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_legends_show_labels_that_the_query_keeps(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    for target in panel["targets"]:
        kept = re.match(
            r"(?:sum|max|histogram_quantile\([\d.]+, sum) by \(([^)]*)\)", target["expr"]
        )
        labels = {label.strip() for label in kept[1].split(",")} if kept else set()
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels


def test_counters_are_shown_as_rates_and_gauges_as_they_are() -> None:
    kinds = {series.name: series.kind for section in SERIES.values() for series in section}
    for query in map(filled, QUERIES):
        for name, _ in selectors(query):
            bare = name.removeprefix(DEFAULT_PREFIX)
            base = re.sub(r"_(bucket|count|sum)$", "", bare)
            is_rate = re.search(rf"(?:rate|increase)\({re.escape(name)}\{{", query) is not None
            assert is_rate == (kinds.get(bare, kinds.get(base)) != "gauge"), query


def test_the_dashboard_has_its_rows_and_no_two_panels_lie_on_each_other() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        "Alarms",
        "Hits by tier",
        "Waits before the first token",
        "Admission",
        "Storage latency",
        "Errors and breakers",
        "Storage traffic",
        "Occupancy and evictions",
        "Transfers",
        "KV events",
    ]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert taken.isdisjoint(cells), panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_dashboard_names_no_data_source_of_ours() -> None:
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert names == {"datasource", "prefix", "instance"}


# Against a real Prometheus.


def growing(n: int) -> CacheSnapshot:
    """The ``n``-th look at a cache in which everything goes on."""
    base = full_snapshot()
    one = backend(
        operations=tuple(
            OperationStatus(op, histogram(*[0.02] * n), {"BackendTimeout": n})
            for op in ("exists", "get", "set")
        ),
        stored_nbytes=n << 20,
        loaded_nbytes=n << 19,
    )
    return full_snapshot(
        counters={name: value * n for name, value in base.counters.items()},
        hit_tokens={tier: value * n for tier, value in base.hit_tokens.items()},
        backends=(one,),
        prefetch_wait_s=histogram(*[0.02] * n),
        load_back_s=histogram(*[0.0005] * n),
        backup_s=histogram(*[0.002] * n),
        eviction_s=histogram(*[0.001] * n),
        transfers=(transfers(n),),
        events=EventsStatus(n, n, 1),
    )


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that scrapes a status server each second; its URL."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus here: sudo apt-get install --no-install-recommends prometheus")
    looks = iter(range(1, 1_000_000))
    collector = CacheCollector(Watch(lambda: growing(next(looks))))
    pages = StatusPages(Watch(full_snapshot), metrics=lambda: exposition(collector))
    server = StatusServer(pages, port=0)
    server.open()
    folder = tmp_path_factory.mktemp("prometheus")
    target = urllib.parse.urlsplit(server.url).netloc
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: hicache, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    log_file = (folder / "log").open("wb")
    child = subprocess.Popen(
        [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log_file,
        stderr=subprocess.STDOUT,
    )
    yield f"http://127.0.0.1:{port}"
    child.terminate()
    child.wait(20)
    log_file.close()
    server.close()


def evaluate(url: str, query: str) -> list[float]:
    """The values of an instant query; empty as long as Prometheus does not answer or has none."""
    address = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=20) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 503:  # it is starting
                return []
            pytest.fail(f"{query}: {error.read().decode()}")
    except OSError:
        return []
    return [float(item["value"][1]) for item in answer["data"]["result"]]


@pytest.mark.slow
def test_a_real_prometheus_answers_every_query(prometheus: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    open_queries = [filled(query) for query in QUERIES]
    while open_queries and time.monotonic() < deadline:
        answers = {query: evaluate(prometheus, query) for query in open_queries}
        open_queries = [
            query
            for query, values in answers.items()
            if not values or not all(map(math.isfinite, values))
        ]
        time.sleep(0.5)
    assert open_queries == []
    (rate,) = evaluate(prometheus, "sum(rate(hicache:storage_stored_bytes_total[30s])) > 0")
    assert rate > 0
    assert set(evaluate(prometheus, "hicache:storage_breaker_state")) == {0.0, 1.0}
