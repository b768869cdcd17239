"""Spans of a real cache: begun where the work begins, ended where it is settled."""

from __future__ import annotations

import uuid

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hicache_core.build import observers
from hicache_core.observe.tracing import BACKUP, LOAD_BACK, PREFETCH, spans
from tests.page_path.world import ids, make_world


def test_prefetch_load_back_and_backup_have_a_span_each(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(observers, "spans", lambda **_: spans(provider=provider))
    share = uuid.uuid4().hex
    writer = make_world(storage={"share": share})
    writer.request(ids(33))
    writer.cache.flush(10.0)
    reader = make_world(storage={"share": share})
    assert reader.request(ids(33)).storage == 32
    for world in (writer, reader):
        world.close()
    ended = {span.name: dict(span.attributes or {}) for span in exporter.get_finished_spans()}
    assert set(ended) == {PREFETCH, LOAD_BACK, BACKUP}
    assert ended[PREFETCH]["hicache.pages"] == 8
    assert ended[LOAD_BACK]["hicache.pages"] == 8
    assert ended[BACKUP]["hicache.pages"] >= 1
    assert ended[PREFETCH]["hicache.request"] == "request-1"
