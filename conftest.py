"""How the whole suite runs: two depths, long files first, and workers that share a machine."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent

LONGEST = (
    "tests/engines/test_vllm.py",
    "tests/engines/test_sglang.py",
    "tests/models/test_models.py",
    "tests/simulation/test_simulation.py",
    "tests/end_to_end/test_dist.py",
    "tests/page_path/test_transformers_groups.py",
    "tests/pd/test_smollm2.py",
    "tests/end_to_end/test_documents.py",
    "tests/end_to_end/test_demo.py",
    "plugins/s3/tests/test_conformance.py",
    "tests/conformance/test_kit.py",
    "plugins/redis/tests/test_kit.py",
    "tests/pd/test_tp.py",
    "tests/end_to_end/test_demo_on_plugins.py",
    "tests/end_to_end/test_readme.py",
    "tests/end_to_end/test_wheels.py",
    "tests/conformance/test_docs.py",
    "tests/pd/test_cluster.py",
    "plugins/hf3fs/tests/test_conformance.py",
)
"""Files that take longest, in order: they start first, so that no worker ends with one of them."""

# Before torch is imported, here and in child processes: tiny models gain nothing from threads, and
# lose a lot where other tests use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Speed is not asserted in a test: an example may take as long as the machine needs.
hypothesis.settings.register_profile(
    "house",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("house")

# A job that a shell runs in the background ignores Ctrl-C, and so would the processes of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def has_engines() -> bool:
    """Whether the environments of the real engines are named; the Makefile does."""
    return "HICACHE_ENGINES" in os.environ


def pytest_report_header(config: pytest.Config) -> str | None:
    """Says what a run at full depth leaves out."""
    if not config.getoption("--full") or has_engines():
        return None
    return "the real engines are left out: `make engines` runs them"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="also what takes long; see CONTRIBUTING.md"
    )


@pytest.hookimpl(trylast=True)  # what the command line selects is selected by then
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what this run is not for; the longest files come first."""
    left_out = [item for item in items if _is_left_out(item, config)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not _is_left_out(item, config)]
    rank = {(ROOT / file).resolve(strict=True): n for n, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def _is_left_out(item: pytest.Item, config: pytest.Config) -> bool:
    """Whether a test belongs to the full depth, or needs an engine, and the run has neither."""
    if item.get_closest_marker("full") is None:
        return False
    needs_engine = (ROOT / "tests/engines") in item.path.parents
    return not config.getoption("--full") or (needs_engine and not has_engines())


def pytest_collection_finish() -> None:
    """What was imported stays: many tests look for garbage, and need not look through it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries look for their own objects when Python ends."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether this is a run at full depth."""
    return bool(pytestconfig.getoption("--full"))
