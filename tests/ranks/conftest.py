"""Fleets of two and of four ranks that many tests use, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks.fleet import Fleet


def _fleet(n_ranks: int, factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(n_ranks, factory.mktemp(f"ranks{n_ranks}")) as fleet:
        fleet.meet()
        yield fleet


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    yield from _fleet(2, tmp_path_factory)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    yield from _fleet(4, tmp_path_factory)


@pytest.fixture(params=[2, 4], ids=["2 ranks", "4 ranks"])
def fleet(request: pytest.FixtureRequest) -> Fleet:
    """Each test that asks for it runs with two ranks and with four."""
    fleet: Fleet = request.getfixturevalue("two" if request.param == 2 else "four")
    return fleet


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The directory of the file store that all ranks share."""
    return str(tmp_path / "store")
