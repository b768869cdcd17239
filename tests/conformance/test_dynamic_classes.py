"""Classes named by JSON go through the same kit: ours, and those written for SGLang's ``dynamic``.

The SGLang-style classes are emulations of what its users write; SGLang itself is not installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from hicache_core.cli.conformance import command
from hicache_core.testing.features import Feature
from hicache_core.testing.recipe import Recipe, Scope
from hicache_core.testing.suite import StorageBackendTests
from tests.conformance.variants import GENERIC, GENERIC_BATCH, Selection, VariantTests

ALONE = StorageBackendTests.features - {
    Feature.DELETE,
    Feature.SECOND_INSTANCE,
    Feature.SECOND_PROCESS,
}


def named(
    class_name: str, module: str = "integrations.sglang_classes", **more: Any
) -> dict[str, Any]:
    return {
        "backend_name": "mine",
        "module_path": f"tests.unit.{module}",
        "class_name": class_name,
        **more,
    }


class TestGenericPath(VariantTests):
    """A class with get, set and exists."""

    selection: ClassVar[Selection] = GENERIC
    features: ClassVar[frozenset[Feature]] = ALONE | {Feature.STATS}

    @pytest.fixture
    def recipe(self) -> Recipe:
        return Recipe.named("dynamic", named("DuckStore"), Scope.INSTANCE)


class TestThreeMethods(VariantTests):
    """A class with get(key), exists(key) and set(key, value), and no base class."""

    selection: ClassVar[Selection] = GENERIC
    features: ClassVar[frozenset[Feature]] = ALONE | {Feature.STATS}

    @pytest.fixture
    def recipe(self) -> Recipe:
        return Recipe.named("dynamic", named("ThreeMethodStore"), Scope.INSTANCE)


class TestGenericBatchPath(VariantTests):
    """A class with SGLang's batch methods, filling the targets in place."""

    selection: ClassVar[Selection] = GENERIC_BATCH
    features: ClassVar[frozenset[Feature]] = ALONE | {Feature.STATS}

    @pytest.fixture
    def recipe(self) -> Recipe:
        return Recipe.named("dynamic", named("BatchStore"), Scope.INSTANCE)


class TestInterfaceV1(StorageBackendTests):
    """A class on registered memory, ``interface_v1``, ``get_page_buffer_meta``: every rule."""

    features: ClassVar[frozenset[Feature]] = ALONE | {Feature.STATS}

    @pytest.fixture
    def recipe(self) -> Recipe:
        settings = named("V1Store", interface_v1=1)
        return Recipe.named("dynamic", settings, Scope.INSTANCE, max_object_nbytes=1 << 20)


def test_the_command_takes_such_a_class(tmp_path: Path) -> None:
    """``hicache conformance dynamic``."""
    report = tmp_path / "report.json"
    where = ["--config", json.dumps(named("DuckStore")), "--json", str(report)]
    result = CliRunner().invoke(command, ["dynamic", "--quick", "--scope", "instance", *where])
    assert result.exit_code == 0, result.output
    assert json.loads(report.read_text())["passed"] is True
