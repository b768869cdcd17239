"""Speeds from measurements: the parts of a time are found again in the times that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hicache_core.bench.client import Reply
from hicache_core.bench.result import Record, as_json
from hicache_core.errors import ConfigError
from hicache_core.fleet.measured import fit_speed, read_speed, read_storage
from hicache_core.fleet.setting import Speed, StorageProfile
from hicache_core.testing.report import Measurement, Report

SPEED = Speed(0.02, 1e-3, 2e-7, 0.03, 0.0, 4e-6)


def measured(*sizes: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Requests of (prompt, cached, output) tokens, one after another, as fast as ``SPEED``."""
    found: list[dict[str, Any]] = []
    at_s = 0.0
    for n_prompt, n_cached, n_output in sizes:
        ttft_s = SPEED.request_s + SPEED.prefill_s(n_prompt - n_cached, n_cached)
        step_s = SPEED.step_s(1, 0) + (n_prompt + n_output / 2) * SPEED.context_s
        latency_s = ttft_s + (n_output - 1) * step_s
        reply = Reply("", ttft_s, latency_s, n_prompt, n_output, n_cached)
        found.append(as_json(Record(0, 0, at_s, n_prompt, reply)))
        at_s += latency_s + 0.01
    return found


SIZES = [(100, 0, 20), (1000, 0, 50), (3000, 0, 10), (3000, 2048, 80), (500, 64, 1), (50, 0, 30)]


def test_the_speed_of_a_server_is_found_from_its_times() -> None:
    found = fit_speed("here", measured(*SIZES))
    for name in ("request_s", "token_s", "pair_s", "decode_s", "context_s"):
        assert getattr(found, name) == pytest.approx(getattr(SPEED, name), rel=1e-6), name


def test_no_part_of_a_speed_is_negative() -> None:
    """Times that fall with the length can only be told by a constant."""
    requests = measured(*SIZES)
    for one in requests:
        one["reply"]["ttft_s"] = 1 / one["reply"]["prompt_tokens"]
    found = fit_speed("here", requests)
    assert found.token_s == found.pair_s == 0
    assert found.request_s > 0


def test_a_result_of_hicache_bench_is_a_speed_and_so_is_a_file_of_values(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"summary": {}, "requests": measured(*SIZES)}))
    assert read_speed(file).token_s == pytest.approx(SPEED.token_s)
    file.write_text(json.dumps({"token_s": 0.5}))
    assert read_speed(file) == Speed(token_s=0.5)


def test_requests_at_the_same_time_or_too_few_are_refused() -> None:
    requests = measured(*SIZES)
    with pytest.raises(ConfigError, match="3 requests are too few"):
        fit_speed("here", requests[:3])
    requests[1]["sent_s"] = 0.01
    with pytest.raises(ConfigError, match=r"here: requests ran at the same time.*--max-parallel 1"):
        fit_speed("here", requests)


def report(small: float, large: float) -> str:
    """What ``hicache conformance --json`` writes of a backend with these rates, in MB/s."""
    values = {
        "exists, median": 100.0,
        "get of 4 KiB, median": 300.0,
        "get, batches of 32 x 4 KiB": small,
        "get, batches of 32 x 1024 KiB": large,
        "set, batches of 32 x 4 KiB": small,
        "set, batches of 32 x 1024 KiB": large / 2,
    }
    return Report("file", [], [Measurement(what, n, "") for what, n in values.items()]).to_json()


def test_the_profile_of_a_backend_is_found_from_the_report_of_the_kit(tmp_path: Path) -> None:
    """A page costs 0.1 ms and its bytes 1 ns each."""
    page_s, nbyte_s = 1e-4, 1e-9
    rates = [size / (page_s + size * nbyte_s) / 1e6 for size in (4 << 10, 1 << 20)]
    file = tmp_path / "report.json"
    file.write_text(report(*rates))
    found = read_storage(file)
    assert found.page_s == pytest.approx(page_s)
    assert found.read_nbytes_per_s == pytest.approx(1e9)
    assert found.question_s == pytest.approx(1e-4)
    assert found.latency_s == pytest.approx(2e-4)
    assert found.write_nbytes_per_s < found.read_nbytes_per_s


def test_a_report_without_figures_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(Report("file", []).to_json())
    with pytest.raises(ConfigError, match="lacks the measurement"):
        read_storage(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "expected a JSON object"),
        ("{", "cannot read"),
        ('{"latency": 1}', "unknown value 'latency'; the values are question_s, latency_s"),
        ('{"latency_s": -1}', "latency_s is -1; it is a number of at least 0"),
        ('{"latency_s": "1"}', "latency_s is '1'"),
    ],
)
def test_a_profile_that_is_wrong_is_a_clear_error(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_storage(file)


def test_a_profile_may_name_some_values(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text('{"latency_s": 0.5}')
    assert read_storage(file) == StorageProfile(latency_s=0.5)
