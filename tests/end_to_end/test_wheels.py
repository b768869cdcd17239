"""The wheels of all distributions, side by side in an environment without the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.wheels import PLUGINS, Installed


@pytest.mark.slow
def test_every_backend_loads_beside_the_core_and_none_needs_torch(
    light: Installed, tmp_path: Path
) -> None:
    listed = json.loads(light.run("hicache", "backends", "--json", cwd=tmp_path))
    found = {(backend["kind"], backend["name"]): backend["status"] for backend in listed}
    expected = [("storage", name) for name in ("file", "memory", *(p.name for p in PLUGINS))]
    expected += [("transfer", name) for name in ("tcp", "mooncake")]
    assert found == dict.fromkeys(expected, "ok")
    code = "import importlib.util; print(importlib.util.find_spec('torch'))"
    assert light.run("python", "-c", code, cwd=tmp_path).strip() == "None"


@pytest.mark.slow
def test_the_embedded_store_works_from_the_wheel(light: Installed, tmp_path: Path) -> None:
    config = json.dumps({"path": str(tmp_path / "store")})
    assert "ok" in light.run("hicache", "doctor", "file", "--config", config, cwd=tmp_path)


@pytest.mark.slow
def test_a_new_backend_is_built_installed_tested_and_listed(
    light: Installed, tmp_path: Path
) -> None:
    """A third party's first five minutes, with nothing of the repository on any path."""
    light.run("hicache", "new-backend", "tape", cwd=tmp_path)
    plugin = tmp_path / "hicache-tape"
    light.install("pytest", "pytest-timeout", "hypothesis", "psutil", "setuptools", "wheel")
    light.install("--no-deps", "--no-build-isolation", plugin)
    assert " passed" in light.run("python", "-m", "pytest", "-q", plugin, cwd=plugin)
    listed = json.loads(light.run("hicache", "backends", "--json", cwd=tmp_path))
    assert "tape" in {backend["name"] for backend in listed if backend["status"] == "ok"}
