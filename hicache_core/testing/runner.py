"""Runs the rules, each in an environment of its own and with a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from hicache_core.config.redact import MASK, masked_text
from hicache_core.testing.bounded import bounded
from hicache_core.testing.features import CAPABILITIES, Feature, Target, detect
from hicache_core.testing.harness import Harness
from hicache_core.testing.kit_settings import FULL, KitSettings
from hicache_core.testing.measurements import measure
from hicache_core.testing.report import Measurement, Report, RuleResult
from hicache_core.testing.rules import RULES
from hicache_core.testing.rules.rule import Rule
from hicache_core.testing.secret_settings import secrets_in


def detect_features(target: Target, settings: KitSettings = FULL) -> frozenset[Feature]:
    """What the backend of ``target`` can do, and what its tests give.

    Raises:
        Hung: it does not open in time.
        Exception: whatever the backend raises.
    """

    def look() -> frozenset[Feature]:
        with Harness(target, settings) as harness:
            return detect(harness.backend, target)

    return bounded(look, settings.rule_s, "opening the backend")


def run_rule(rule: Rule, target: Target, settings: KitSettings = FULL) -> RuleResult:
    """Runs one rule, even if it does not apply; always returns in bounded time.

    A backend that hangs leaves a thread behind that nothing can end.

    Args:
        rule: the rule.
        target: the backend under test.
        settings: sizes and limits.
    """
    started = time.monotonic()

    def check() -> None:
        with Harness(target, settings) as harness:
            rule.check(harness)

    try:
        bounded(check, settings.rule_s * rule.patience, f"the rule {rule.id}")
    except Exception as error:  # a stranger's code may raise anything: that is the finding
        message = _told(error, target)
        return RuleResult.of(rule, "failed", message, time.monotonic() - started)
    return RuleResult.of(rule, "passed", elapsed_s=time.monotonic() - started)


def run(
    target: Target,
    settings: KitSettings = FULL,
    *,
    rules: Sequence[Rule] = RULES,
    on_result: Callable[[RuleResult], None] = lambda _: None,
    figures: bool = True,
) -> Report:
    """Runs ``rules`` in order, then measures.

    Args:
        target: the backend under test.
        settings: sizes and limits.
        rules: the rules to run; the rules that they need must be among them.
        on_result: called after each rule.
        figures: whether to measure the speed at the end, if every rule has passed.
    """
    features: frozenset[Feature] = frozenset()
    results: dict[str, RuleResult] = {}
    broken: set[str] = set()
    for rule in rules:
        result = _left_out(rule, features, broken) or run_rule(rule, target, settings)
        if result.status == "failed" or not broken.isdisjoint(rule.needs):
            broken.add(rule.id)
        if rule.id == "opens" and result.status == "passed":
            features = detect_features(target, settings)
        results[rule.id] = result
        on_result(result)
    report = Report(target.recipe.backend_class.name, list(results.values()))
    if not figures or not report.passed:
        return report
    return Report(report.backend, report.results, _measured(target, settings))


def _left_out(rule: Rule, features: frozenset[Feature], broken: set[str]) -> RuleResult | None:
    """Why ``rule`` is not run; None if it is."""
    wanting = [feature for feature in rule.requires if feature not in features]
    if wanting:
        if not CAPABILITIES.isdisjoint(wanting):
            return RuleResult.of(rule, "not implemented")
        return RuleResult.of(rule, "not run", f"for want of {wanting[0]}")
    for need in rule.needs:
        if need in broken:
            return RuleResult.of(rule, "not run", f"it builds on {need}, which has not passed")
    return None


def _told(error: BaseException, target: Target) -> str:
    """``error`` in one line without the secrets of the settings."""
    notes = " ".join(getattr(error, "__notes__", []))
    text = " ".join(f"{type(error).__name__}: {error} {notes}".split())
    for secret in secrets_in(target.recipe.settings):
        text = text.replace(secret, MASK)
    return masked_text(text)


def _measured(target: Target, settings: KitSettings) -> list[Measurement]:
    with Harness(target, settings) as harness:
        return bounded(lambda: measure(harness), 5 * settings.rule_s, "the measurement")
