"""Every test of the page path gives back what it took; see ``tests/leaks.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.leaks import LeakWatch
from tests.page_path import backends
from tests.page_path.world import World


@pytest.fixture(autouse=True)
def leak_watch() -> Iterator[None]:
    """Fails a test that leaves something behind.

    It begins before the test's own fixtures and ends after them; those of the module are not its
    business.
    """
    watch = LeakWatch()
    watch.start()
    yield
    wrong = watch.stop()
    if wrong:
        pytest.fail("\n".join(["the test leaks", *wrong]), pytrace=False)


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
