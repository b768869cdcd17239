"""``hicache collect-env``: what a bug report needs, and no secret."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from hicache_core.cli.collect_env import shown_environment
from hicache_core.cli.main import main


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["collect-env", *arguments])
    assert not caught.value.code
    return capsys.readouterr().out


def test_it_names_versions_plugins_with_their_entry_points_and_the_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = json.loads(printed(capsys, "--json", "--no-check"))
    assert report["packages"]["hicache-core"] == version("hicache-core")
    assert report["packages"]["torch"] == version("torch")
    plugins = {(plugin["kind"], plugin["name"]): plugin for plugin in report["plugins"]}
    assert plugins["storage", "redis"]["module"] == "hicache_redis"
    assert plugins["transfer", "tcp"]["status"] == "installed"
    ours = {"group": "sglang.srt.plugins", "name": "hicache"}
    assert [point for point in report["engine_plugins"] if ours.items() <= point.items()]
    assert report["cpus"] >= 1
    assert report["memory"]["available_nbytes"] > 0
    assert set(report["native"]) == {"keys", "pools", "copies"}


def test_it_loads_plugins_and_torch_in_children(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys)
    lines = [line.split() for line in out.splitlines()]
    assert [line for line in lines if line[:2] == ["memory", "storage"] and "ok" in line]
    assert [line for line in lines if line[:2] == ["torch", "version"]]
    assert version("hicache-core") in out


def test_only_variables_that_matter_are_shown_and_their_secrets_are_not() -> None:
    extra = '{"url": "redis://u:hunter2@host", "password": "hunter2", "db": 1}'
    environ = {
        "HICACHE_PAGE_SIZE": "32",
        "HICACHE_API_KEY": "hunter2",
        "HICACHE_DISAGGREGATION_SECRET": "hunter2",
        "HICACHE_STORAGE_BACKEND_EXTRA_CONFIG": extra,
        "HICACHE_KV_EVENTS_CONFIG": '{"password": "hunter2"',
        "AWS_ACCESS_KEY_ID": "hunter2",
        "AWS_REGION": "eu-central-1",
        "REDIS_URL": "redis://:hunter2@host/0",
        "HF_TOKEN": "hunter2",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-team=Basic hunter2",
        "HICACHE_OPTIONS": "--requirepass hunter2 --port 1",
        "HICACHE_PW": "hunter2",
        "HICACHE_YAML": "password: hunter2",
        "HOME": "/home/hunter2",
    }
    shown = shown_environment(environ)
    assert "hunter2" not in str(shown)
    assert "HOME" not in shown
    assert (shown["HICACHE_PAGE_SIZE"], shown["AWS_REGION"]) == ("32", "eu-central-1")
    assert json.loads(shown["HICACHE_STORAGE_BACKEND_EXTRA_CONFIG"])["db"] == 1
    assert shown["REDIS_URL"] == "redis://***@host/0"
    assert list(shown) == sorted(shown)
