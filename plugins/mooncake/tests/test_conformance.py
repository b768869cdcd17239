"""The conformance kit on a real master, the memory lent by another process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
from hicache_mooncake import MooncakeBackend
from hicache_mooncake.client import Client

from hicache_core.testing.features import Feature
from hicache_core.testing.recipe import Recipe
from hicache_core.testing.rules.rule import Rule
from hicache_core.testing.suite import StorageBackendTests
from tests.servers.mooncake import Master, running_mooncake

SETTINGS = {"global_segment_size": 0, "rpc_timeout_s": 1.0, "retry_interval_s": 0.2}


class MasterControl:
    """Power over a master."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self.kill = master.kill
        self.freeze = master.freeze
        self.thaw = master.thaw

    def restart(self) -> None:
        """Starts the master and waits for the process that lends the memory."""
        self._master.restart()
        self._master.wait_for_memory()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """A master and a process that lends it a gibibyte."""
    with running_mooncake(tmp_path_factory.mktemp("world"), 1 << 30) as master:
        yield master


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """A master and a process that lends it little."""
    with running_mooncake(tmp_path_factory.mktemp("small"), 32 << 20) as master:
        yield master


def recipe_for(master: Master) -> Recipe:
    """Backends that lend nothing themselves, so that one that is killed takes no page with it."""
    where = {"master_server_address": master.address, "master_metrics_port": master.metrics_port}
    return Recipe.of(MooncakeBackend, {**where, **SETTINGS})


def sets_up_twice(rule: Rule) -> bool:
    """Whether ``open`` has to find out in a child process first that a master answers."""
    return rule.id == "opens" or Feature.CONTROL in rule.requires


class TestMooncake(StorageBackendTests):
    """Every rule that applies."""

    features: ClassVar[frozenset[Feature]] = StorageBackendTests.features | {
        Feature.CLEAR,
        Feature.CONTROL,
        Feature.DIAGNOSE,
        Feature.LIST,
        Feature.PIN,
        Feature.REGISTER_MEMORY,
        Feature.SMALL_STORE,
        Feature.STATS,
        Feature.USAGE,
    }

    @pytest.fixture(autouse=True)
    def _trial_where_it_may_fail(
        self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A trial loads Mooncake in a process of its own; a master that is well needs none."""
        is_rule = "conformance_rule" in request.fixturenames
        if is_rule and not sets_up_twice(request.getfixturevalue("conformance_rule")):
            monkeypatch.setattr(Client, "_try_setup", lambda *_: None)

    @pytest.fixture
    def recipe(self, world: Master) -> Recipe:
        # docstring inherited
        return recipe_for(world)

    @pytest.fixture
    def store_control(self, world: Master) -> MasterControl:
        # docstring inherited
        return MasterControl(world)

    @pytest.fixture
    def small_store(self, small_world: Master) -> Recipe:
        # docstring inherited
        return recipe_for(small_world)
