"""``make dist`` builds what an index of packages takes, and it installs on every Python of ours."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.end_to_end.wheels import PLUGINS, ROOT, Installed
from tools.dist import metadata_of

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(900)]

URL = "https://example.org/hicache"
PYTHONS = re.findall(
    r"Programming Language :: Python :: (3\.\d+)",
    "\n".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]),
)


def interpreter(version: str) -> Path | None:
    """The interpreter of a Python version on this machine: on the path, or one of pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = shutil.which(f"python{version}")
    for path in (*map(Path, filter(None, [found])), *root.glob(f"versions/{version}.*/bin/python")):
        asked = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False)
        if answer.stdout.strip() == version:
            return path
    return None


OURS = "{}.{}".format(*sys.version_info)
FOUND = {version: path for version in PYTHONS if (path := interpreter(version))}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make dist`` makes, with a wheel of the core for each interpreter that is here."""
    folder = tmp_path_factory.mktemp("dist") / "dist"
    others = [str(path) for version, path in FOUND.items() if version != OURS]
    command = [
        "make",
        "dist",
        f"PYTHON={sys.executable}",
        f"DIST={folder}",
        f"DIST_PYTHONS={' '.join(others)}",
    ]
    made = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PROJECT_URL": URL},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


def test_there_is_an_sdist_and_a_wheel_of_each(dist: Path) -> None:
    names = {f"hicache_{name}" for name in ("core", *(plugin.name for plugin in PLUGINS))}
    assert {path.name.partition("-")[0] for path in dist.glob("*.tar.gz")} == names
    assert {path.name.partition("-")[0] for path in dist.glob("*.whl")} == names
    natives = list(dist.glob("hicache_core-*.whl"))
    assert len(natives) >= len(FOUND) > 0
    assert all("-manylinux" in path.name for path in natives)


def test_metadata_and_links_have_the_url_that_was_given(dist: Path) -> None:
    linked = set()
    for wheel in dist.glob("*.whl"):
        metadata = metadata_of(wheel)
        assert f"Source, {URL}" in (metadata.get_all("Project-URL") or [])
        if f"]({URL}/blob/v{metadata['Version']}/" in str(metadata.get_payload()):
            linked.add(metadata["Name"])
    assert {"hicache-core", "hicache-redis"} <= linked  # their pages link to others of ours


@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheels_work_on_each_python_of_the_classifiers(
    dist: Path, tmp_path: Path, version: str
) -> None:
    """Core and plugins load, the native modules are in use, and the file store keeps the rules."""
    if version not in FOUND:
        pytest.skip(f"Python {version} is not installed here")
    subprocess.run([FOUND[version], "-m", "venv", tmp_path / "venv"], check=True)
    made = Installed(tmp_path / "venv", dist)
    made.install("--only-binary", ":all:", "hicache-core", *(f"hicache-{p.name}" for p in PLUGINS))
    told = made.run("hicache", "version", cwd=tmp_path)
    assert told.splitlines()[-3:] == ["keys: native", "pools: native", "copies: native"]
    assert f"python {version}." in told
    assert "broken" not in made.run("hicache", "backends", cwd=tmp_path)
    made.install("pytest", "pytest-timeout", "hypothesis", "psutil")
    config = f'{{"path": "{tmp_path / "kv"}"}}'
    command = ["conformance", "file", "--config", config, "--quick"]
    assert "backend 'file' conforms" in made.run("hicache", *command, cwd=tmp_path)
