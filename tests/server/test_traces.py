"""A trace goes through: the cache's spans stand below the call that caused them."""

from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hicache_core.build import observers as build_observers
from hicache_core.engine.model import LoadedModel
from hicache_core.observe import tracing
from tests.server.tiny import ROOM, TinyServer, tiny_server

PROMPT = [3 + n % 40 for n in range(70)]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Where the spans of caches go that are built meanwhile."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def spans(*, enabled: bool) -> tracing.Spans:
        return tracing.spans(enabled=enabled, provider=provider)

    monkeypatch.setattr(build_observers, "spans", spans)
    return exporter


async def call(server: TinyServer, number: int) -> None:
    """One request with a trace and an id of its own."""
    body = {
        "input_ids": PROMPT,
        "rid": f"client-{number}",
        "sampling_params": {"max_new_tokens": 2, "temperature": 0.0},
    }
    header = {"traceparent": f"00-{number:032x}-{number:016x}-01"}
    (await server.client.post("/generate", json=body, headers=header)).raise_for_status()


@pytest.mark.anyio
async def test_every_span_of_the_cache_is_a_child_of_its_call(
    tiny_chat: LoadedModel,
    tmp_path: Path,
    exported: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HICACHE_TRACING", "true")
    flags = [
        *("--model-path", "tiny", *ROOM, "--enable-hierarchical-cache", "--page-size", "16"),
        *("--hicache-storage-backend", "file", "--hicache-storage-backend-extra-config"),
        f'{{"path": "{tmp_path / "store"}", "prefetch_threshold": 16}}',
        *("--hicache-storage-prefetch-policy", "wait_complete"),
    ]
    for number in (1, 2):  # the second server finds in storage what the first has left
        async with tiny_server(tiny_chat, flags) as server:
            await call(server, number)
            await server.settle()
    ended = exported.get_finished_spans()
    assert {span.name for span in ended} == {tracing.PREFETCH, tracing.LOAD_BACK, tracing.BACKUP}
    for span in ended:
        assert span.parent is not None, span.name
        number = span.parent.span_id
        assert span.parent.trace_id == number
        assert dict(span.attributes or {})["hicache.request"] == f"client-{number}"
    assert {span.parent.span_id for span in ended if span.parent is not None} == {1, 2}
