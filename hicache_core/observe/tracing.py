"""Spans around prefetch, load_back and backup: OpenTelemetry's where it is installed, else nothing.

An operation begins in one ``poll()`` and ends in another, so spans are begun and ended by calls.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer, TracerProvider

PREFETCH = "hicache.prefetch"
LOAD_BACK = "hicache.load_back"
BACKUP = "hicache.backup"

Attribute = str | bool | int | float


@dataclass(frozen=True, slots=True)
class Origin:
    """The request for which something is done, as its client and its trace know it.

    Attributes:
        request: the id that the client knows; empty for none.
        traceparent: of the parent span, in the format of W3C Trace Context; empty for none.
    """

    request: str = ""
    traceparent: str = ""


_origin: ContextVar[Origin | None] = ContextVar("hicache_origin", default=None)


@contextlib.contextmanager
def on_behalf_of(origin: Origin | None) -> Iterator[None]:
    """Spans that begin inside, on this thread, belong to the request; None changes nothing."""
    if origin is None:
        yield
        return
    token = _origin.set(origin)
    try:
        yield
    finally:
        _origin.reset(token)


def traceparent(given: str = "") -> str:
    """The ``traceparent`` of the current span, or ``given``, the header of the caller.

    Empty if OpenTelemetry's API is not installed, since no span would use it.
    """
    try:
        module = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
    except ImportError:
        return ""
    carrier: dict[str, str] = {}
    module.TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", given)


class SpanHandle(ABC):
    """A span that has begun."""

    @abstractmethod
    def end(self, *, error: str = "", **attributes: Attribute) -> None:
        """Ends it; a second call does nothing.

        Args:
            error: what failed; empty if nothing did.
            attributes: what is known now, such as ``pages=12``; shown as ``hicache.pages``.
        """


class Spans(ABC):
    """Makes spans. Owner thread."""

    @abstractmethod
    def begin(self, name: str, *, request_id: str = "", **attributes: Attribute) -> SpanHandle:
        """Begins a span now.

        Its parent is that given to ``on_behalf_of``, or the current span of this thread.

        Args:
            name: ``PREFETCH``, ``LOAD_BACK`` or ``BACKUP``.
            request_id: used if ``on_behalf_of`` has no request id; empty for none.
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
        origin = _origin.get() or Origin()
        if shown := origin.request or request_id:
            named["hicache.request"] = shown
        span = self._tracer.start_span(
            name,
            context=_context(origin.traceparent),
            attributes=named,
            start_time=self._now_ns(),
        )
        return _OpenTelemetrySpan(span, self._now_ns)


def spans(
    *,
    enabled: bool = True,
    provider: TracerProvider | None = None,
    now_ns: Callable[[], int] = time.time_ns,
) -> Spans:
    """OpenTelemetry's spans, or spans that do nothing.

    Args:
        enabled: if False, nothing is imported and no spans are made.
        provider: OpenTelemetry's tracer provider; None for the global one.
        now_ns: nanoseconds since 1970.
    """
    if not enabled:
        return NoSpans()
    try:
        trace = importlib.import_module("opentelemetry.trace")
    except ImportError:
        return NoSpans()
    return _OpenTelemetrySpans(trace.get_tracer("hicache", tracer_provider=provider), now_ns)


def _context(traceparent: str) -> Context | None:
    """The context of a parent; None for the current one, also if ``traceparent`` is malformed."""
    if not traceparent:
        return None
    module = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
    found: Context = module.TraceContextTextMapPropagator().extract({"traceparent": traceparent})
    return found


def _named(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {f"hicache.{name}": value for name, value in attributes.items()}
