"""``hicache simulate``: a table, JSON and a picture of every combination of the listed values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hicache_core.cli.simulate import EVICTIONS, ROUTERS, command
from hicache_core.errors import ConfigError
from hicache_core.fleet.routing import ROUTERS as KNOWN_ROUTERS
from hicache_core.radix.eviction import POLICY_NAMES


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Thirty requests of 1,000 tokens, on six documents of 512."""
    rows = [
        {
            "timestamp": 1000 * n,
            "input_length": 1000,
            "output_length": 10,
            "hash_ids": [n % 6, 6 + n],
        }
        for n in range(30)
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments], catch_exceptions=True)


def rows_of(tmp_path: Path, *arguments: object) -> list[dict[str, Any]]:
    file = tmp_path / "out.json"
    shown = run(*arguments, "--json", file)
    assert shown.exit_code == 0, shown.output
    found = json.loads(file.read_text())
    assert isinstance(found, list)
    return found


def test_every_combination_has_a_row(trace: Path, tmp_path: Path) -> None:
    rows = rows_of(
        tmp_path,
        trace,
        "--servers",
        "1,2",
        "--device-size",
        "0.5",
        "--host-size",
        "0,2",
        "--jobs",
        1,
    )
    keys = [(one["setting"]["servers"], one["setting"]["host_gb"]) for one in rows]
    assert keys == [(1, 0.0), (1, 2.0), (2, 0.0), (2, 2.0)]
    assert rows[1]["hit_rate"] > rows[0]["hit_rate"]
    assert {one["trace"] for one in rows} == {"trace.jsonl"}
    for one in rows:
        assert one["prompt_tokens"] == 30_000 == one["requests"] * 1000
        assert sum(one["hit_tokens"].values()) + one["computed_tokens"] == 30_000


def test_the_table_shows_what_differs_and_says_what_is_assumed(trace: Path, tmp_path: Path) -> None:
    shown = run(trace, "--router", "prefix,load", "--jobs", 1)
    assert "ROUTER" in shown.output
    assert "EVICTION" not in shown.output
    assert "The speed of a server is assumed" in shown.output
    assert "The speed of storage" not in shown.output
    speed = tmp_path / "speed.json"
    speed.write_text('{"token_s": 0.001}')
    shown = run(trace, "--speed", speed, "--host-size", 1, "--storage-size", "inf", "--jobs", 1)
    assert "The speed of a server" not in shown.output
    assert "The speed of storage is assumed" in shown.output
    assert "no limit" in shown.output


def test_prices_add_a_cost(trace: Path, tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, trace, "--price-server", 3600, "--jobs", 1)
    assert row["cost"] == pytest.approx(row["duration_s"])


def test_several_traces_and_lengths_alone(trace: Path, tmp_path: Path) -> None:
    other = tmp_path / "azure.csv"
    lines = [f"2024-01-01 00:00:{n:02},500,9\n" for n in range(20)]
    other.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(lines))
    rows = rows_of(tmp_path, trace, other, "--continues", 0, "--system-prompts", 1, "--jobs", 1)
    assert [one["trace"] for one in rows] == ["trace.jsonl", "azure.csv"]
    assert rows[1]["hit_tokens"]["device"] == 19 * 448  # seven whole pages


def test_a_picture_is_drawn(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.png"
    sizes = "0,1,inf"
    shown = run(trace, "--servers", "1,2", "--host-size", 1, "--storage-size", sizes, "--png", file)
    assert shown.exit_code == 0, shown.output
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_request_that_fits_no_device_is_told(trace: Path) -> None:
    shown = run(trace, "--device-size", 0.05, "--jobs", 1)
    assert "Up to 30 requests were refused" in shown.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--storage-size", "1"), "storage needs a host tier"),
        (("--host-size", "inf"), "host_gb is inf"),
        (("--speed", "absent.json"), "cannot read absent.json"),
    ],
)
def test_what_cannot_be_is_a_clear_error(
    trace: Path, arguments: tuple[str, ...], said: str
) -> None:
    shown = run(trace, *arguments)
    assert isinstance(shown.exception, ConfigError)
    assert said in str(shown.exception)


def test_lists_are_checked_when_they_are_read(trace: Path) -> None:
    assert "0 is not in the range" in run(trace, "--servers", "1,0").output
    assert "'fast' is not one of" in run(trace, "--router", "load,fast").output


def test_the_command_knows_all_routers_and_policies() -> None:
    """They are written in the command, so that its help imports nothing slow."""
    assert tuple(KNOWN_ROUTERS) == ROUTERS
    assert {*EVICTIONS, "priority"} == set(POLICY_NAMES)


def test_a_sweep_without_a_served_request_cannot_be_drawn(trace: Path, tmp_path: Path) -> None:
    shown = run(trace, "--device-size", 0.05, "--png", tmp_path / "none.png")
    assert "nothing to draw" in str(shown.exception)
