"""Every test of the page path gives back what it took; see ``tests/leaks.py``."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.leaks import LeakWatch

_WATCH = pytest.StashKey[LeakWatch]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Watches from before the first fixture."""
    watch = item.stash[_WATCH] = LeakWatch()
    watch.start()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Fails a test that leaves something behind after its last fixture."""
    try:
        return (yield)
    finally:
        wrong = item.stash[_WATCH].stop()
        if wrong:
            pytest.fail("\n".join(["the test leaks", *wrong]), pytrace=False)
