"""Spans: their times, names and attributes with OpenTelemetry; nothing at all without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, use_span

from hicache_core.observe.tracing import (
    BACKUP,
    LOAD_BACK,
    PREFETCH,
    NoSpans,
    Origin,
    on_behalf_of,
    spans,
    traceparent,
)


@pytest.fixture
def provider() -> Iterator[TracerProvider]:
    made = TracerProvider()
    yield made
    made.shutdown()


@pytest.fixture
def exported(provider: TracerProvider) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


def test_a_span_has_the_times_at_which_it_was_begun_and_ended(
    provider: TracerProvider, exported: InMemorySpanExporter
) -> None:
    now = [100]
    making = spans(provider=provider, now_ns=lambda: now[0])
    handle = making.begin(PREFETCH, request_id="r1", tokens=4096)
    now[0] = 350
    assert exported.get_finished_spans() == ()
    handle.end(pages=12, tier="storage")
    (span,) = exported.get_finished_spans()
    assert (span.name, span.start_time, span.end_time) == ("hicache.prefetch", 100, 350)
    assert dict(span.attributes or {}) == {
        "hicache.tokens": 4096,
        "hicache.request": "r1",
        "hicache.pages": 12,
        "hicache.tier": "storage",
    }
    assert span.status.status_code is StatusCode.UNSET


def test_operations_may_end_in_any_order(
    provider: TracerProvider, exported: InMemorySpanExporter
) -> None:
    making = spans(provider=provider)
    first, second = making.begin(LOAD_BACK), making.begin(BACKUP)
    first.end()
    second.end()
    ended = exported.get_finished_spans()
    assert [span.name for span in ended] == ["hicache.load_back", "hicache.backup"]
    assert [span.parent for span in ended] == [None, None], "one is not below the other"


def test_a_span_is_below_the_request_that_is_current(
    provider: TracerProvider, exported: InMemorySpanExporter
) -> None:
    request = provider.get_tracer("engine").start_span("request")
    with use_span(request):
        handle = spans(provider=provider).begin(PREFETCH)
    handle.end()
    (span,) = exported.get_finished_spans()
    assert span.parent is not None
    assert span.parent.span_id == request.get_span_context().span_id


def test_a_failure_is_told(provider: TracerProvider, exported: InMemorySpanExporter) -> None:
    handle = spans(provider=provider).begin(PREFETCH)
    handle.end(error="BackendTimeout")
    handle.end(pages=5)
    (span,) = exported.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "BackendTimeout"
    assert not span.attributes, "a second end does nothing"


def test_what_is_done_for_a_request_stands_below_its_span_and_names_it(
    provider: TracerProvider, exported: InMemorySpanExporter
) -> None:
    """On the thread of an engine, which serves many requests and is inside no span of theirs."""
    making = spans(provider=provider)
    for n in (1, 2):
        with on_behalf_of(Origin(f"client-{n}", f"00-{n:032x}-{n:016x}-01")):
            prefetch = making.begin(PREFETCH, request_id="internal")
            backup = making.begin(BACKUP)
        prefetch.end()
        backup.end()
    making.begin(BACKUP).end()
    ended = exported.get_finished_spans()
    parents = [span.parent and (span.parent.trace_id, span.parent.span_id) for span in ended]
    assert parents == [(1, 1), (1, 1), (2, 2), (2, 2), None]
    named = [dict(span.attributes or {}).get("hicache.request") for span in ended]
    assert named == ["client-1", "client-1", "client-2", "client-2", None]


@pytest.mark.parametrize("header", ["", "nonsense", "00-0-0-00", "00-" + "f" * 500])
def test_a_header_that_is_none_makes_a_span_without_parent(
    provider: TracerProvider, exported: InMemorySpanExporter, header: str
) -> None:
    with on_behalf_of(Origin("r", header)):
        spans(provider=provider).begin(PREFETCH).end()
    (span,) = exported.get_finished_spans()
    assert span.parent is None


def test_the_span_that_is_current_goes_before_the_callers_header(provider: TracerProvider) -> None:
    given = f"00-{1:032x}-{2:016x}-01"
    assert traceparent(given) == given
    assert traceparent() == ""
    span = provider.get_tracer("server").start_span("POST /generate")
    with use_span(span):
        assert f"{span.get_span_context().span_id:016x}" in traceparent(given)


def test_disabled_spans_are_nothing() -> None:
    making = spans(enabled=False)
    assert isinstance(making, NoSpans)
    making.begin(PREFETCH, tokens=1).end(error="none", pages=1)


@pytest.mark.parametrize("is_installed", [True, False])
def test_disabled_or_absent_nothing_is_imported(is_installed: bool) -> None:
    """Without the API, or with it but disabled, no module of OpenTelemetry is loaded."""
    code = (
        "import sys\n"
        f"if not {is_installed}: sys.modules['opentelemetry'] = None\n"
        "from hicache_core.observe.tracing import NoSpans, PREFETCH, spans\n"
        f"making = spans(enabled={not is_installed})\n"
        "assert type(making) is NoSpans\n"
        "making.begin(PREFETCH, tokens=1).end(pages=1)\n"
        "loaded = [m for m in sys.modules if m.startswith('opentelemetry.')]\n"
        "sys.exit(bool(loaded))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
