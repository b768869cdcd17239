"""The times and counts of requests, as SGLang's dashboards ask for them."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from hicache_core.engine.config import EngineStatus
from hicache_core.engine.request import CachedTokens, Output, Times
from hicache_core.server.request_metrics import RequestMetrics, ServerCollector

STATUS = EngineStatus(1, 2, 4096, 0, 0.0, 0.0, 0, 0, 0, 7, 512, "")


class World:
    """Requests whose tokens come when the test says."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.metrics = RequestMetrics(lambda: self.now_s)
        self._registry = CollectorRegistry(auto_describe=False)
        labels = {"model_name": "x"}
        self._registry.register(ServerCollector(self.metrics, lambda: STATUS, "sglang:", labels))

    def output(
        self, after_s: float, n_new: int, reason: str | None = None, name: str = "r"
    ) -> None:
        self.now_s += after_s
        times = Times(100.0, 100.5, 101.0, self.now_s if reason else 0.0)
        tokens = tuple(range(n_new))
        self.metrics.take(Output(name, tokens, "", reason, "", 3, n_new, CachedTokens(), times))

    def value(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"sglang:{name}", {"model_name": "x", **labels})


def test_the_time_between_two_tokens_is_counted_once_for_each_but_the_first() -> None:
    world = World()
    world.output(1.0, 1)
    world.output(0.03, 1)
    world.output(9.0, 1, name="other")  # a first token
    world.output(0.0, 2)  # 9 s for two
    world.output(0.0, 0, "stop")
    assert world.value("inter_token_latency_seconds_count") == 3
    assert world.value("inter_token_latency_seconds_sum") == pytest.approx(9.03)
    assert world.value("inter_token_latency_seconds_bucket", le="0.035") == 1
    assert world.value("inter_token_latency_seconds_bucket", le="6.0") == 3


def test_a_name_that_is_used_again_begins_anew() -> None:
    world = World()
    for _ in range(2):
        world.output(5.0, 1)
        world.output(0.01, 1, "stop")
    assert world.value("inter_token_latency_seconds_count") == 2
    assert world.value("inter_token_latency_seconds_sum") == pytest.approx(0.02)


def test_the_queue_time_ends_when_a_request_runs_first() -> None:
    world = World()
    world.output(2.0, 1, "length")
    assert world.value("queue_time_seconds_count") == 1
    assert world.value("queue_time_seconds_sum") == 0.5


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_an_answer_that_came_whole_counts_the_mean_time_between_its_tokens(reason: str) -> None:
    world = World()
    world.output(1.0, 1)
    world.output(3.0, 4, reason)  # the first token came at 101 s, the last at 104 s
    assert world.value("request_time_per_output_token_seconds_count") == 1
    assert world.value("request_time_per_output_token_seconds_sum") == pytest.approx(1.0)
    assert world.value("request_time_per_output_token_seconds_bucket", le="0.8") == 0
    assert world.value("request_time_per_output_token_seconds_bucket", le="1.0") == 1


@pytest.mark.parametrize(("n_new", "reason"), [(4, "abort"), (4, "error"), (1, "stop")])
def test_an_answer_of_one_token_and_one_that_broke_off_have_no_such_time(
    n_new: int, reason: str
) -> None:
    world = World()
    world.output(3.0, n_new, reason)
    assert world.value("request_time_per_output_token_seconds_count") == 0


def test_what_the_engine_counts_has_sglangs_names() -> None:
    world = World()
    world.output(0.0, 0, "abort")
    assert world.value("max_total_num_tokens") == 4096
    assert world.value("num_retracted_requests_total") == 7
    assert world.value("num_aborted_requests_total") == 1
