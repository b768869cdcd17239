"""The wheels of all distributions, side by side in an environment without the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))


def run(*command: str | Path, cwd: Path) -> str:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=environ,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with every wheel, and nothing of the repository."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist"]
    run(*build, ROOT, *PLUGINS, cwd=folder)
    wheels = sorted((folder / "dist").glob("hicache_*.whl"))
    assert len(wheels) == 1 + len(PLUGINS)
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    constraints = ["--constraint", ROOT / "constraints.txt"]
    install = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    run(*install, *constraints, *wheels, cwd=folder)
    return folder


@pytest.mark.slow
def test_every_backend_loads_beside_the_core_and_none_needs_torch(environment: Path) -> None:
    hicache = environment / "venv" / "bin" / "hicache"
    listed = json.loads(run(hicache, "backends", "--json", cwd=environment))
    found = {(backend["kind"], backend["name"]): backend["status"] for backend in listed}
    expected = [("storage", name) for name in ("file", "memory", *(p.name for p in PLUGINS))]
    expected += [("transfer", name) for name in ("tcp", "mooncake")]
    assert found == dict.fromkeys(expected, "ok")
    python = environment / "venv" / "bin" / "python"
    code = "import importlib.util; print(importlib.util.find_spec('torch'))"
    assert run(python, "-c", code, cwd=environment).strip() == "None"


@pytest.mark.slow
def test_the_embedded_store_works_from_the_wheel(environment: Path) -> None:
    hicache = environment / "venv" / "bin" / "hicache"
    config = json.dumps({"path": str(environment / "store")})
    assert "ok" in run(hicache, "doctor", "file", "--config", config, cwd=environment)


@pytest.mark.slow
def test_a_new_backend_is_built_installed_tested_and_listed(environment: Path) -> None:
    """A third party's first five minutes, with nothing of the repository on any path."""
    python = environment / "venv" / "bin" / "python"
    hicache = python.with_name("hicache")
    run(hicache, "new-backend", "tape", cwd=environment)
    plugin = environment / "hicache-tape"
    install = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    tools = ["pytest", "pytest-timeout", "hypothesis", "psutil", "setuptools", "wheel"]
    run(*install, "--constraint", ROOT / "constraints.txt", *tools, cwd=environment)
    run(*install, "--no-deps", "--no-build-isolation", plugin, cwd=environment)
    assert " passed" in run(python, "-m", "pytest", "-q", plugin, cwd=plugin)
    listed = json.loads(run(hicache, "backends", "--json", cwd=environment))
    assert "tape" in {backend["name"] for backend in listed if backend["status"] == "ok"}
