"""A store that the last version wrote is served by this one, byte by byte, and written on."""

from __future__ import annotations

import base64
import json
import lzma
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hicache_core import DevicePool, HiCache, KVSpec, Namespace
from tests.compatibility.make_store import (
    PAGE_SIZE,
    REQUESTS,
    SPEC,
    n_pages,
    opened,
    put_objects,
    row_bytes,
    rows,
    settings_in,
    store_prompt,
    worlds,
)
from tests.servers import valkey, weed

STORES = sorted((Path(__file__).parent / "stores").iterdir())
BACKENDS = ["file", "hf3fs", "redis", "s3"]

Store = tuple[str, dict[str, Any]]
"""The name of a backend and its settings."""


@pytest.fixture(scope="module", params=STORES, ids=lambda path: path.name)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    """A store made before: a folder, or a server with the objects that one held."""
    archive: Path = request.param
    backend = archive.name.partition("-")[0]
    folder = tmp_path_factory.mktemp(backend)
    if archive.suffixes[-2] == ".tar":
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        yield backend, settings_in(folder, backend)
        return
    with server(backend, folder) as settings:
        text = json.loads(lzma.decompress(archive.read_bytes()))
        put_objects(backend, settings, {k: base64.b64decode(v) for k, v in text.items()})
        yield backend, settings


@contextmanager
def server(backend: str, folder: Path) -> Iterator[dict[str, Any]]:
    """An empty server of a backend; its settings."""
    if backend == "redis":
        with valkey.running() as running:
            yield {"url": running.url}
        return
    with closing(weed.Weed(folder / "weed")) as running_weed:
        yield weed.settings(running_weed.url)


def assert_served(cache: HiCache, pool: DevicePool, ids: list[int], namespace: Namespace) -> None:
    """Every whole page that the cache lacks comes from storage, with the bytes that were stored."""
    prompt = [*ids, 7]  # the last token of a prompt is never looked up
    n_missing = n_pages(ids) * PAGE_SIZE - cache.match_prefix(prompt, namespace).n_device_tokens
    assert cache.prefetch("r", prompt, namespace)
    while not cache.prefetch_ready("r"):
        cache.wait(5.0)
        cache.poll()
    assert cache.finish_prefetch("r") == n_missing > 0
    match = cache.match_prefix(prompt, namespace)
    cache.lock(match.node)
    pages = cache.load_back(match).device_pages
    assert len(pages) == n_pages(ids)
    for layer in range(SPEC.num_layers):
        cache.wait_layer(layer)
    for page, page_id in enumerate(pages):
        for component, layer, row in rows(pool, page_id):
            expected = row_bytes(ids, namespace, page, component, layer, row.numel())
            assert bytes(row.flatten().tolist()) == expected, (page, component, layer)
    cache.unlock(match.node)


def test_there_is_a_store_of_each_backend_that_keeps_objects_when_it_ends() -> None:
    """Mooncake keeps them in the memory of its clients, which end with the version."""
    assert [path.name.partition("-")[0] for path in STORES] == BACKENDS


@pytest.mark.parametrize(("spec", "layout"), worlds(), ids=lambda value: str(value)[:20])
def test_every_byte_is_served(store: Store, spec: KVSpec, layout: str) -> None:
    with opened(*store, spec, layout) as (cache, pool):
        for ids, namespace in REQUESTS:
            assert_served(cache, pool, ids, namespace)


def test_it_is_written_on(store: Store) -> None:
    added = [*range(16), *range(500, 520)]  # its first pages are in the store, the others not
    with opened(*store, SPEC, "page_first") as (cache, pool):
        store_prompt(cache, pool, added, Namespace())
    with opened(*store, SPEC, "page_first") as (cache, pool):
        assert_served(cache, pool, added, Namespace())
        assert_served(cache, pool, [2**32 - 1 - n for n in range(12)], Namespace())
