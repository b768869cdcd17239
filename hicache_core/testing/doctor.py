"""Examines one store for ``hicache doctor``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hicache_core.config.redact import MASK, masked_text
from hicache_core.storage.base import Diagnosable, Finding
from hicache_core.testing.features import Target
from hicache_core.testing.harness import Harness, expect
from hicache_core.testing.kit_settings import KitSettings
from hicache_core.testing.measurements import measure
from hicache_core.testing.report import Measurement
from hicache_core.testing.rules.rule import Rule
from hicache_core.testing.runner import run_rule
from hicache_core.testing.secret_settings import secrets_in

_SHAPE = (64, 65472)
_SLOW_GET_US = 50_000.0  # a page that takes longer to come is hardly worth waiting for


def examine(target: Target, settings: KitSettings) -> Iterator[Finding]:
    """Opens the store, asks the backend for findings, stores and reads pages, measures the speed.

    Each step has a time limit. No finding contains a secret of the settings.

    Yields:
        Findings, the most basic first; after a failed step it ends.
    """
    hidden = secrets_in(target.recipe.settings)
    for finding in _examine(target, settings):
        message = finding.message
        for secret in hidden:
            message = message.replace(secret, MASK)
        yield Finding(finding.level, finding.topic, masked_text(message))


def _examine(target: Target, settings: KitSettings) -> Iterator[Finding]:
    findings: list[Finding] = []

    def speed(h: Harness) -> None:
        findings.extend(_judged(measurement) for measurement in measure(h))

    steps: dict[str, tuple[str, Callable[[Harness], None]]] = {
        "open": ("the store is there and takes the credentials", _open),
        "own checks": ("", lambda h: findings.extend(_said_by_backend(h))),
        "round trip": ("4 pages were stored and read back", _round_trip),
        "speed": ("", speed),
    }
    for topic, (well, check) in steps.items():
        result = run_rule(Rule(topic, topic, check), target, settings)
        if result.status == "failed":
            yield Finding("error", topic, result.message)
            return
        if well:
            yield Finding("ok", topic, well)
        yield from findings
        findings.clear()


def _open(h: Harness) -> None:
    h.another()


def _said_by_backend(h: Harness) -> Iterator[Finding]:
    diagnosable = h.backend.capability(Diagnosable)
    if diagnosable is not None:
        return diagnosable.diagnose()
    return iter([Finding("ok", "own checks", "the backend has none (it is not Diagnosable)")])


def _round_trip(h: Harness) -> None:
    keys = h.keys(4)
    h.put(h.backend, keys, _SHAPE)
    n_present = h.backend.batch_exists(keys)
    expect(n_present == len(keys), f"{n_present} of {len(keys)} stored pages are there")
    h.expect_pages(h.backend, keys, _SHAPE)


def _judged(measurement: Measurement) -> Finding:
    told = f"{measurement.what}: {measurement.value:,.4g} {measurement.unit}"
    if measurement.what.startswith("get of") and measurement.value > _SLOW_GET_US:
        told += "; that is slow for a cache: put the store nearer, or raise prefetch_threshold"
        return Finding("warning", "speed", told)
    return Finding("ok", "speed", told)
