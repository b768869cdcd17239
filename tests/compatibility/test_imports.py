"""Paths that documents named and plugins imported keep working; those that moved say where to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "imports-0.1.0.txt"
PATHS = {line.split()[0]: line.split()[1:] for line in FILE.read_text().splitlines()}
GONE = {"hicache_core.testing.simulation"}
"""What went on purpose: the simulation needs the repository's tests."""

IMPORTS = """
import importlib, json, sys, warnings
found = {}
for path, names in json.load(sys.stdin).items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            module = importlib.import_module(path)
            missing = [name for name in names if not hasattr(module, name)]
        except ImportError as error:
            missing = [str(error)]
    told = [str(one.message) for one in caught if one.category is DeprecationWarning]
    found[path] = (missing, [one for one in told if path in one], getattr(module, "__file__", ""))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[list[str], list[str], str]]:
    """Of each path, imported in one fresh process: names that lack, warnings, the file."""
    child = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        input=json.dumps({path: names for path, names in PATHS.items() if path not in GONE}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    answer: dict[str, tuple[list[str], list[str], str]] = json.loads(child.stdout)
    return answer


def test_every_name_is_found_at_the_path_of_the_last_version(
    found: dict[str, tuple[list[str], list[str], str]],
) -> None:
    assert len(PATHS) > 40
    assert {path: missing for path, (missing, _, _) in found.items() if missing} == {}


def test_a_path_that_moved_says_where_to(
    found: dict[str, tuple[list[str], list[str], str]],
) -> None:
    moved = {
        path
        for path, (_, _, file) in found.items()
        if "warn_moved(" in Path(file).read_text(encoding="utf-8")
    }
    moved.add("hicache_core.config")  # the package stayed, the name in it moved
    told = {path: warnings for path, (_, warnings, _) in found.items() if warnings}
    assert told.keys() == moved
    for path, (first, *_) in told.items():
        assert first.startswith(path)
        assert " has moved to hicache_core" in first
    assert len(moved) == 14
