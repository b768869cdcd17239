"""The conformance kit as a pytest class. Needs the extra ``hicache-core[testing]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest

from hicache_core.testing.control import StoreControl
from hicache_core.testing.features import Feature, Target
from hicache_core.testing.kit_settings import QUICK, KitSettings
from hicache_core.testing.recipe import Recipe
from hicache_core.testing.rules import RULES
from hicache_core.testing.rules.rule import Rule
from hicache_core.testing.runner import detect_features, run_rule


class StorageBackendTests:
    """Every rule of the storage contract as one test; subclass it and give one fixture::

        class TestRedis(StorageBackendTests):
            @pytest.fixture
            def recipe(self, server):
                return Recipe.named("redis", {"url": server.url})

    Attributes:
        features: what the backend can do and which fixtures exist, in addition to the base
            contract. Only the rules that apply are collected, so that nothing is skipped;
            ``test_features`` fails if this has too many or too few.
        kit: sizes and time limits.
    """

    features: ClassVar[frozenset[Feature]] = frozenset(
        [Feature.DELETE, Feature.SECOND_INSTANCE, Feature.SECOND_PROCESS, Feature.HYPOTHESIS]
    )
    kit: ClassVar[KitSettings] = QUICK

    @pytest.fixture
    def recipe(self) -> Recipe:
        """Makes backends on the store of this test."""
        raise NotImplementedError("give a fixture `recipe` that returns a Recipe")

    @pytest.fixture
    def store_control(self) -> StoreControl | None:
        """Control over the server of the store; define it together with ``Feature.CONTROL``."""
        return None

    @pytest.fixture
    def small_store(self) -> Recipe | None:
        """Makes backends on a store with little room; for ``Feature.SMALL_STORE``."""
        return None

    @pytest.fixture
    def quota_store(self) -> Recipe | None:
        """Makes backends on a store with a quota by namespace; for ``Feature.QUOTA``."""
        return None

    @pytest.fixture
    def expiring_store(self) -> Recipe | None:
        """Makes backends on a store whose objects expire; for ``Feature.TTL``."""
        return None

    @pytest.fixture
    def conformance_target(
        self,
        recipe: Recipe,
        store_control: StoreControl | None,
        small_store: Recipe | None,
        quota_store: Recipe | None,
        expiring_store: Recipe | None,
    ) -> Target:
        """The backend under test, with all fixtures.

        Args:
            recipe: the fixture of that name.
            store_control: the fixture of that name; None without ``Feature.CONTROL``.
            small_store: the fixture of that name; None without ``Feature.SMALL_STORE``.
            quota_store: the fixture of that name; None without ``Feature.QUOTA``.
            expiring_store: the fixture of that name; None without ``Feature.TTL``.
        """
        return Target(recipe, store_control, small_store, quota_store, expiring_store)

    @classmethod
    def rules(cls) -> Sequence[Rule]:
        """The rules that apply, in the order of the kit."""
        return [rule for rule in RULES if cls.features.issuperset(rule.requires)]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each rule that applies."""
        if "conformance_rule" in metafunc.fixturenames:
            rules = self.rules()
            metafunc.parametrize("conformance_rule", rules, ids=[rule.id for rule in rules])

    def test_rule(self, conformance_rule: Rule, conformance_target: Target) -> None:
        """The backend keeps one rule of the contract."""
        result = run_rule(conformance_rule, conformance_target, self.kit)
        if result.status == "failed":
            pytest.fail(f"{result.text}\n{result.message}", pytrace=False)

    def test_features(self, conformance_target: Target) -> None:
        """``features`` is what the backend can do and the fixtures give, no more and no less."""
        found = detect_features(conformance_target, self.kit)
        more = sorted(feature.name for feature in found - self.features)
        fewer = sorted(feature.name for feature in self.features - found)
        assert not more, f"add to `features`, so that their rules are tested: {', '.join(more)}"
        assert not fewer, f"remove from `features`, for they are not there: {', '.join(fewer)}"
