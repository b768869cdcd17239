"""Spans around prefetch, load_back and backup: OpenTelemetry's where it is installed, else nothing.

An operation begins in one ``poll()`` and ends in another, so spans are begun and ended by calls.
"""

from __future__ import annotations

import hashlib
import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer, TracerProvider

PREFETCH = "hicache.prefetch"
LOAD_BACK = "hicache.load_back"
BACKUP = "hicache.backup"

Attribute = str | bool | int | float


class SpanHandle(ABC):
    """A span that has begun."""

    @abstractmethod
    def end(self, *, error: str = "", **attributes: Attribute) -> None:
        """Ends it; a second call does nothing.

        Args:
            error: what went wrong; empty if nothing did.
            attributes: what is known now, such as ``pages=12``; shown as ``hicache.pages``.
        """


class Spans(ABC):
    """Makes spans. Owner thread."""

    @abstractmethod
    def begin(self, name: str, *, request_id: str = "", **attributes: Attribute) -> SpanHandle:
        """Begins a span now, below the one that is current on this thread.

        Args:
            name: ``PREFETCH``, ``LOAD_BACK`` or ``BACKUP``.
            request_id: shown as a hash, since ids may name users; empty for no request.
            attributes: such as ``tokens=4096, tier="storage"``; shown as ``hicache.tokens``, ….
        """


class _NoSpan(SpanHandle):
    """Nothing, at the price of one call."""

    def end(self, *, error: str = "", **attributes: Attribute) -> None:  # noqa: ARG002 - no span
        # docstring inherited
        return


class NoSpans(Spans):
    """Makes none."""

    _NOTHING = _NoSpan()

    def begin(
        self,
        name: str,  # noqa: ARG002 - makes none
        *,
        request_id: str = "",  # noqa: ARG002
        **attributes: Attribute,  # noqa: ARG002
    ) -> SpanHandle:
        # docstring inherited
        return self._NOTHING


class _OpenTelemetrySpan(SpanHandle):
    def __init__(self, span: Span, now_ns: Callable[[], int]) -> None:
        self._span: Span | None = span
        self._now_ns = now_ns

    def end(self, *, error: str = "", **attributes: Attribute) -> None:
        # docstring inherited
        span, self._span = self._span, None
        if span is None:
            return
        span.set_attributes(_named(attributes))
        if error:
            status = importlib.import_module("opentelemetry.trace.status")
            span.set_status(status.Status(status.StatusCode.ERROR, error))
        span.end(end_time=self._now_ns())


class _OpenTelemetrySpans(Spans):
    def __init__(self, tracer: Tracer, now_ns: Callable[[], int]) -> None:
        self._tracer = tracer
        self._now_ns = now_ns

    def begin(self, name: str, *, request_id: str = "", **attributes: Attribute) -> SpanHandle:
        # docstring inherited
        named = _named(attributes)
        if request_id:
            named["hicache.request"] = request_hash(request_id)
        span = self._tracer.start_span(name, attributes=named, start_time=self._now_ns())
        return _OpenTelemetrySpan(span, self._now_ns)


def spans(
    *,
    enabled: bool = True,
    provider: TracerProvider | None = None,
    now_ns: Callable[[], int] = time.time_ns,
) -> Spans:
    """OpenTelemetry's spans; none if they are not wanted or its API is not installed.

    Args:
        enabled: False imports nothing and makes none.
        provider: whose spans; the global one's if None.
        now_ns: nanoseconds since 1970.
    """
    if not enabled:
        return NoSpans()
    try:
        trace = importlib.import_module("opentelemetry.trace")
    except ImportError:
        return NoSpans()
    return _OpenTelemetrySpans(trace.get_tracer("hicache", tracer_provider=provider), now_ns)


def request_hash(request_id: str) -> str:
    """A request id as spans show it: 16 hex digits that tell requests apart and nothing more."""
    return hashlib.sha256(request_id.encode()).hexdigest()[:16]


def _named(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {f"hicache.{name}": value for name, value in attributes.items()}
