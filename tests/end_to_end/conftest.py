"""Wheels of this repository, built once a run, and environments made of them."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from tests.end_to_end.wheels import PLUGINS, Installed, built, environment
from tests.shared_folders import shared_folder


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory, "wheels", built) / "dist"


@pytest.fixture(scope="session")
def light(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The core without extras, and every plugin."""
    made = environment(tmp_path_factory.mktemp("light"), wheels)
    made.install("hicache-core", *(f"hicache-{plugin.name}" for plugin in PLUGINS))
    return made


@pytest.fixture(scope="session")
def installed(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Every wheel of ours beside the libraries of the tests' own environment.

    A path file lends those libraries. Path files of a lent folder are not read, and so the
    editable installation of the repository stays out.
    """
    made = environment(tmp_path_factory.mktemp("installed"), wheels)
    made.install("--no-deps", *wheels.glob("hicache_*.whl"))
    (own,) = made.venv.glob("lib/python*/site-packages")
    (own / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = made.run("python", "-c", "import hicache_core; print(hicache_core.__file__)", cwd=own)
    assert Path(where).is_relative_to(own)
    return made
