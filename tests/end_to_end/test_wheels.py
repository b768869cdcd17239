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
    found = {backend["name"]: backend["status"] for backend in listed}
    assert found == dict.fromkeys(["file", "memory", *(p.name for p in PLUGINS)], "ok")
    python = environment / "venv" / "bin" / "python"
    code = "import importlib.util; print(importlib.util.find_spec('torch'))"
    assert run(python, "-c", code, cwd=environment).strip() == "None"


@pytest.mark.slow
def test_the_embedded_store_and_the_templates_are_in_the_wheel(environment: Path) -> None:
    hicache = environment / "venv" / "bin" / "hicache"
    config = json.dumps({"path": str(environment / "store")})
    assert "ok" in run(hicache, "doctor", "file", "--config", config, cwd=environment)
    run(hicache, "new-backend", "tape", cwd=environment)
    assert (environment / "hicache-tape" / "pyproject.toml").is_file()
