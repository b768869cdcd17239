"""The examination of one store for ``hicache doctor``: findings in plain words."""

from __future__ import annotations

from collections.abc import Iterator

from hicache_core.errors import BackendError
from hicache_core.redact import MASK, masked_text
from hicache_core.storage.base import Diagnosable, Finding
from hicache_core.testing.bounded import Hung, bounded
from hicache_core.testing.features import Target
from hicache_core.testing.figures import measure
from hicache_core.testing.harness import Harness, RuleBroken, expect
from hicache_core.testing.hidden import secrets_in
from hicache_core.testing.report import Figure
from hicache_core.testing.settings import KitSettings

_SHAPE = (64, 65472)
_SLOW_GET_US = 50_000.0  # a page that takes longer to come is hardly worth waiting for


def examine(target: Target, settings: KitSettings) -> Iterator[Finding]:
    """Opens the store, asks the backend for its findings, stores and reads, measures.

    Yields:
        Findings, most basic first; the first error of opening or of the round trip is the last.
        No secret of the settings is in them.
    """
    hidden = secrets_in(target.recipe.settings)
    for finding in _examine(target, settings):
        message = finding.message
        for secret in hidden:
            message = message.replace(secret, MASK)
        yield Finding(finding.level, finding.topic, masked_text(message))


def _examine(target: Target, settings: KitSettings) -> Iterator[Finding]:
    with Harness(target, settings) as h:
        try:
            bounded(lambda: h.backend, settings.answer_s, "open()")
        except (BackendError, Hung) as error:
            yield Finding("error", "open", f"{type(error).__name__}: {error}")
            return
        yield Finding("ok", "open", "the store is there and takes the credentials")
        yield from _said_by_backend(h)
        try:
            bounded(lambda: _round_trip(h), settings.rule_s, "the round trip")
            figures = bounded(lambda: measure(h), 5 * settings.rule_s, "the measurement")
        except (BackendError, Hung, RuleBroken) as error:
            yield Finding("error", "round trip", f"{type(error).__name__}: {error}")
            return
        yield Finding("ok", "round trip", "4 pages were stored and read back")
        yield from map(_judged, figures)


def _said_by_backend(h: Harness) -> Iterator[Finding]:
    backend = h.backend
    if not isinstance(backend, Diagnosable):
        yield Finding("ok", "own checks", "the backend has none (it is not Diagnosable)")
        return
    try:
        yield from bounded(lambda: list(backend.diagnose()), h.settings.rule_s, "diagnose()")
    except (BackendError, Hung) as error:
        yield Finding("error", "own checks", f"{type(error).__name__}: {error}")


def _round_trip(h: Harness) -> None:
    keys = h.keys(4)
    h.put(h.backend, keys, _SHAPE)
    n_present = h.backend.batch_exists(keys)
    expect(n_present == len(keys), f"{n_present} of {len(keys)} stored pages are there")
    h.expect_pages(h.backend, keys, _SHAPE)


def _judged(figure: Figure) -> Finding:
    told = f"{figure.what}: {figure.value:,.4g} {figure.unit}"
    if figure.what.startswith("get of") and figure.value > _SLOW_GET_US:
        told += "; that is slow for a cache: put the store nearer, or raise prefetch_threshold"
        return Finding("warning", "speed", told)
    return Finding("ok", "speed", told)
