"""A directory of installed distributions, real to importlib.metadata, on sys.path for one test."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent / "hicache-example"


class Site:
    """A site-packages directory that a test fills."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def add(
        self, distribution: str, points: Mapping[str, str], version: str = "1.0", **modules: str
    ) -> None:
        """Writes a distribution: its metadata, its entry points and its modules' sources."""
        info = self.directory / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = [f"{name} = {module}\n" for name, module in points.items()]
        (info / "entry_points.txt").write_text("[hicache.backends]\n" + "".join(lines))
        self.write(**modules)

    def write(self, **modules: str) -> None:
        """Writes modules by their path without .py; give one in a package as ``**{"a/b": …}``."""
        for name, source in modules.items():
            file = self.directory / (f"{name}.py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    def environ(self) -> dict[str, str]:
        """The environment of a child process that sees this directory too."""
        path = [str(self.directory), *(entry for entry in sys.path if entry)]
        return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    before = set(sys.modules)
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(directory)
    yield Site(directory)
    for name in set(sys.modules) - before:  # two tests may use one module name
        file = getattr(sys.modules[name], "__file__", None)
        if file and str(tmp_path) in file:
            del sys.modules[name]


@pytest.fixture(scope="session")
def example_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Where pip has installed the distribution of ``hicache-example/``."""
    root = tmp_path_factory.mktemp("example")
    source = root / "source"  # a build leaves traces in the source tree
    shutil.copytree(EXAMPLE, source)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--no-index", "--target", str(root / "site"), str(source)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return Site(root / "site")
