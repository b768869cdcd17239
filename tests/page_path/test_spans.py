"""Spans of a real cache: begun where the work begins, ended where it is settled."""

from __future__ import annotations

import uuid
from dataclasses import replace

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hicache_core.observe.tracing import BACKUP, LOAD_BACK, PREFETCH, spans
from tests.page_path.world import World, ids, make_world


def test_prefetch_load_back_and_backup_have_a_span_each() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    share = uuid.uuid4().hex
    writer = traced(make_world(storage={"share": share}), provider)
    writer.request(ids(33))
    writer.cache.flush(10.0)
    reader = traced(make_world(storage={"share": share}), provider)
    assert reader.request(ids(33)).storage == 32
    for world in (writer, reader):
        world.close()
    ended = {span.name: dict(span.attributes or {}) for span in exporter.get_finished_spans()}
    assert set(ended) == {PREFETCH, LOAD_BACK, BACKUP}
    assert ended[PREFETCH]["hicache.pages"] == 8
    assert ended[LOAD_BACK]["hicache.pages"] == 8
    assert ended[BACKUP]["hicache.pages"] >= 1
    assert ended[PREFETCH]["hicache.request"] == "request-1"


def traced(world: World, provider: TracerProvider) -> World:
    """The world, with the spans that its configuration would give it, from ``provider``."""
    cache = world.cache
    parts = replace(cache._parts, spans=spans(provider=provider))
    for holder in (cache, cache._write_path, cache._load_back_path, cache._prefetch_path):
        holder._parts = parts  # type: ignore[union-attr]
    return world
