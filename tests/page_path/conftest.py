"""Every test of the page path gives back what it took; see ``tests/leaks.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.leaks import leak_watch
from tests.page_path import backends
from tests.page_path.tiny_models import ARCHITECTURES, tiny_model
from tests.page_path.world import World

__all__ = ["leak_watch", "model", "worlds"]


@pytest.fixture(params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny model of each architecture, which the test may change."""
    return tiny_model(request.param)


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    """Worlds to be closed, and checked, at the end; on backends that start empty."""
    backends.reset()
    made: list[World] = []
    yield made
    backends.open_gates()
    for world in made:
        world.close()
    backends.reset()
