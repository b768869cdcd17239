"""Every test of the engine gives back what it took; see ``tests/leaks.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.leaks import LeakWatch


@pytest.fixture(autouse=True)
def leak_watch() -> Iterator[None]:
    """Fails a test that leaves caches, locks, pages, threads or descriptors behind."""
    watch = LeakWatch()
    watch.start()
    yield
    wrong = watch.stop()
    if wrong:
        pytest.fail("\n".join(["the test leaks", *wrong]), pytrace=False)
