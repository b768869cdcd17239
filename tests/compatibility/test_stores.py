"""A store that the last version wrote is served by this one, byte by byte, and written on."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from hicache_core import DevicePool, HiCache, KVSpec, Namespace
from tests.compatibility.make_store import (
    PAGE_SIZE,
    REQUESTS,
    SPEC,
    n_pages,
    opened,
    row_bytes,
    rows,
    store_prompt,
    worlds,
)

STORES = sorted((Path(__file__).parent / "stores").glob("*.tar.xz"))


@pytest.fixture(params=STORES, ids=lambda path: path.name)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder with a store made before, and the name of its backend."""
    archive: Path = request.param
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path, archive.name.partition("-")[0]


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


def test_there_is_a_store_of_each_backend_that_needs_no_server() -> None:
    assert [path.name for path in STORES] == ["file-0.1.0.tar.xz", "hf3fs-0.1.0.tar.xz"]


@pytest.mark.parametrize(("spec", "layout"), worlds(), ids=lambda value: str(value)[:20])
def test_every_byte_is_served(store: tuple[Path, str], spec: KVSpec, layout: str) -> None:
    folder, backend = store
    with opened(folder, backend, spec, layout) as (cache, pool):
        for ids, namespace in REQUESTS:
            assert_served(cache, pool, ids, namespace)


def test_it_is_written_on(store: tuple[Path, str]) -> None:
    folder, backend = store
    added = [*range(16), *range(500, 520)]  # its first pages are in the store, the others not
    with opened(folder, backend, SPEC, "page_first") as (cache, pool):
        store_prompt(cache, pool, added, Namespace())
    with opened(folder, backend, SPEC, "page_first") as (cache, pool):
        assert_served(cache, pool, added, Namespace())
        assert_served(cache, pool, [2**32 - 1 - n for n in range(12)], Namespace())
