"""``hicache router``: what it is told, and what it says."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner, Result
from starlette.testclient import TestClient

from hicache_core.cli import router
from hicache_core.errors import ConfigError

SECRET = "s" * 32


def started(monkeypatch: pytest.MonkeyPatch, *flags: str, **env: str) -> tuple[Result, list[Any]]:
    """What the command said, and the applications that it would have served."""
    apps: list[Any] = []
    monkeypatch.setattr(router.uvicorn, "run", lambda app, **_: apps.append(app))
    result = CliRunner().invoke(router.command, flags, env=env)
    return result, apps


def test_a_secret_that_nodes_would_refuse_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--decode", "http://127.0.0.1:1", "--disaggregation-secret", "short"]
    result, apps = started(monkeypatch, *flags)
    assert isinstance(result.exception, ConfigError)
    assert "short" not in str(result.exception)
    assert apps == []


@pytest.mark.parametrize(
    ("url", "secret", "warned"),
    [
        ("http://127.0.0.1:1", "", False),
        ("http://10.0.0.7:1", "", True),
        ("http://10.0.0.7:1", SECRET, False),
    ],
)
def test_nodes_elsewhere_without_a_secret_are_said_at_start(
    monkeypatch: pytest.MonkeyPatch, url: str, secret: str, warned: bool
) -> None:
    env = {"HICACHE_DISAGGREGATION_SECRET": secret}
    result, apps = started(monkeypatch, "--decode", url, **env)
    assert len(apps) == 1
    assert ("--disaggregation-secret" in result.output) is warned
    assert SECRET not in result.output


def test_a_router_needs_no_fastapi() -> None:
    code = "import sys; sys.modules['fastapi'] = None; import hicache_core.cli.router"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == 0, child.stderr


def test_a_path_that_is_not_there_is_answered_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (app,) = started(monkeypatch, "--decode", "http://127.0.0.1:1")
    client = TestClient(app)
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/generate", 405)):
        answer = client.request(method, path)
        assert (answer.status_code, set(answer.json())) == (status, {"detail"})
