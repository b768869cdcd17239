"""A cache says in the store what its namespace stands for."""

from __future__ import annotations

import uuid

import pytest

from hicache_core.storage.manifest import MANIFEST_HASH, read_manifests
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.types import BackendContext
from tests.page_path import world as world_module
from tests.page_path.backends import Store
from tests.page_path.world import make_world


@pytest.fixture(autouse=True)
def _pages_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = world_module.KVSpec.mha(
        num_layers=2, num_heads=1, head_dim=64, dtype="float32", fingerprint="tiny-test-model"
    )
    monkeypatch.setattr(world_module, "SPEC", spec)


def test_a_store_that_a_cache_has_opened_says_what_its_namespace_is() -> None:
    share = uuid.uuid4().hex
    store = MemoryBackend(MemoryConfig(share=share), BackendContext(""))
    store.open()
    world = make_world(storage={"share": share})
    world.cache.poll()
    world.close()
    (manifest,) = read_manifests(store).values()
    assert manifest.fields["model_fingerprint"] == "tiny-test-model"
    assert manifest.fields["layout"] == "page_first"
    store.close()


def test_a_transport_that_must_know_all_memory_takes_the_manifest_too() -> None:
    settings = {
        "backend_name": "registering",
        "module_path": "tests.page_path.backends",
        "class_name": "Registering",
    }
    Store.objects.clear()
    world = make_world(backend="dynamic", storage=settings)
    world.cache.poll()
    world.close()
    assert [key.partition("/")[2] for key in Store.objects] == [MANIFEST_HASH]
    Store.objects.clear()
