"""What a rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hicache_core.testing.features import CAPABILITIES, Feature
from hicache_core.testing.harness import Harness


@dataclass(frozen=True)
class Rule:
    """One thing that a backend must do.

    Attributes:
        id: stable name, in reports and as the test's id.
        text: the rule in a sentence.
        check: raises if the backend breaks it.
        requires: the features without which the rule does not apply.
        needs: ids of rules that it builds on.
        patience: how many times ``KitSettings.rule_s`` it may take.
    """

    id: str
    text: str
    check: Callable[[Harness], None]
    requires: tuple[Feature, ...] = ()
    needs: tuple[str, ...] = ()
    patience: float = 1.0

    @property
    def level(self) -> Literal["base", "capability"]:
        """``capability`` if it is about what only some backends can do."""
        return "base" if CAPABILITIES.isdisjoint(self.requires) else "capability"


class RuleBook:
    """The rules of one module, in the order of its functions."""

    def __init__(self, *needs: str) -> None:
        """Starts empty; ``needs`` are what each of its rules builds on."""
        self._needs = needs
        self.rules: list[Rule] = []

    def rule(
        self,
        text: str,
        *,
        requires: Feature | tuple[Feature, ...] = (),
        needs: tuple[str, ...] = (),
        patience: float = 1.0,
    ) -> Callable[[Callable[[Harness], None]], Callable[[Harness], None]]:
        """Adds the decorated function as a rule; its name is the id.

        Args:
            text: what the rule requires, in one sentence.
            requires: features without which the rule does not apply.
            needs: ids of rules that must have passed before.
            patience: factor on the time that a rule may take.
        """

        def add(check: Callable[[Harness], None]) -> Callable[[Harness], None]:
            required = (requires,) if isinstance(requires, Feature) else requires
            needed = (*self._needs, *needs)
            self.rules.append(Rule(check.__name__, text, check, required, needed, patience))
            return check

        return add
