"""``hicache bench``: what it sends, what it measures, what it says when a server fails."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.bench.multiturn import MultiTurn
from hicache_core.bench.result import percentile
from hicache_core.cli.bench import command
from tests.unit.bench.fake_server import FakeServer, serving

SMALL = ("--num-clients 3 --num-rounds 4 --request-length 16 --output-length 8").split()  # noqa: SIM905


@pytest.fixture
def server() -> Iterator[tuple[FakeServer, str]]:
    with serving() as made:
        yield made


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def measured(tmp_path: Path, url: str, *arguments: object) -> dict[str, Any]:
    file = tmp_path / "out.json"
    shown = bench(*arguments, "--url", url, "--json", file)
    assert shown.exit_code == 0, shown.output
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("api", ["generate", "completions", "chat"])
def test_each_turn_carries_the_whole_conversation(
    server: tuple[FakeServer, str], tmp_path: Path, api: str
) -> None:
    """Hits and lengths come out to the word: 16 + (8 + 16) a round, whole pages of 8 are hits."""
    _, url = server
    found = measured(tmp_path, url, "multiturn", *SMALL, "--api", api)["summary"]
    lengths = [16, 40, 64, 88]
    assert found["requests"] == 12
    assert found["failed"] == 0
    assert found["prompt_tokens"] == 3 * sum(lengths)
    assert found["output_tokens"] == 12 * 8
    expected = 3 * sum(lengths[:3])
    assert found["cached_tokens"] == expected
    assert found["hit_tokens"] == {"device": expected, "host": 0, "storage": 0}
    assert found["hit_tokens_source"] == "replies"
    assert [one["cached_tokens"] for one in found["rounds"]] == [0, 3 * 16, 3 * 40, 3 * 64]
    assert found["ttft_s"]["p50"] <= found["ttft_s"]["p99"] <= found["latency_s"]["max"]


def test_where_the_replies_do_not_tell_the_tiers_the_status_does(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    fake, url = server
    fake.reports_tiers = False
    found = measured(tmp_path, url, "multiturn", *SMALL)["summary"]
    assert found["hit_tokens_source"] == "cache"
    assert found["hit_tokens"]["device"] == fake.hits > 0


def test_no_more_than_max_parallel_requests_are_under_way(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    fake, url = server
    measured(tmp_path, url, "multiturn", *SMALL, "--max-parallel", 1)
    assert fake.most_running == 1


def test_a_shared_prefix_is_hit_by_other_clients(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    _, url = server
    arguments = (*SMALL, "--num-rounds", 1, "--shared-prefix-share", 0.5, "--max-parallel", 1)
    found = measured(tmp_path, url, "multiturn", *arguments)["summary"]
    assert found["cached_tokens"] == 2 * 8


def test_two_runs_of_a_seed_send_the_same(server: tuple[FakeServer, str], tmp_path: Path) -> None:
    fake, url = server
    measured(tmp_path, url, "multiturn", *SMALL)
    first = sorted(body["prompt"] for body in fake.bodies)
    fake.bodies.clear()
    measured(tmp_path, url, "multiturn", *SMALL, "--ready-queue-policy", "fifo")
    assert sorted(body["prompt"] for body in fake.bodies) == first


def test_a_failing_server_is_said_and_the_rest_is_measured(
    server: tuple[FakeServer, str],
) -> None:
    fake, url = server
    fake.fail_after = 5
    shown = bench("multiturn", *SMALL, "--url", url, "--max-parallel", 1)
    assert shown.exit_code == 1
    assert "HTTP 503" in shown.output
    assert "TTFT" in shown.output


def test_nobody_there_is_said(tmp_path: Path) -> None:
    shown = bench("multiturn", *SMALL, "--url", "http://127.0.0.1:1")
    assert shown.exit_code == 1
    assert "3 of 3 requests failed: ConnectError" in shown.output


def test_the_cache_is_flushed_if_asked_and_a_picture_drawn(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    fake, url = server
    picture = tmp_path / "out.png"
    measured(tmp_path, url, "multiturn", *SMALL, "--flush-cache", "--png", picture)
    assert fake.flushes == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_words_come_from_a_dataset_unless_that_is_disabled(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    fake, url = server
    dataset = tmp_path / "chats.json"
    turns = [{"value": "uno due tre"}, {"value": "quattro cinque"}]
    dataset.write_text(json.dumps([{"conversations": turns}]))
    arguments = ("multiturn", *SMALL, "--num-rounds", 1, "--dataset-path", dataset)
    measured(tmp_path, url, *arguments)
    italian = {"uno", "due", "tre", "quattro", "cinque"}
    assert {word for body in fake.bodies for word in body["prompt"].split()} == italian
    fake.bodies.clear()
    measured(tmp_path, url, *arguments, "--disable-random-sample")
    assert not {word for body in fake.bodies for word in body["prompt"].split()} & italian


def test_where_figures_cannot_be_written_is_said_before_the_run(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    fake, url = server
    for option in ("--json", "--png"):
        shown = bench("multiturn", "--url", url, option, tmp_path / "missing" / "out")
        assert shown.exit_code == 2
        assert f"there is no folder {tmp_path / 'missing'}" in " ".join(shown.output.split())
    assert fake.bodies == []


# Figures.


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_a_value_that_enough_are_not_above(
    values: list[float], share: float
) -> None:
    found = percentile(values, share)
    assert found in values
    assert found is not None
    assert sum(value <= found for value in values) >= share * len(values) * (1 - 1e-9)


@pytest.mark.parametrize("distribution", ["poisson", "uniform"])
def test_pauses_make_the_request_rate(distribution: str) -> None:
    load = MultiTurn(request_rate=4.0, distribution=distribution)
    chance = random.Random(1)
    mean = sum(load.pause_s(chance) for _ in range(4000)) / 4000
    assert mean == pytest.approx(0.25, rel=0.1)
    assert MultiTurn().pause_s(chance) == 0.0
