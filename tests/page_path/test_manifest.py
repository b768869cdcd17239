"""A cache says in the store what its namespace stands for."""

from __future__ import annotations

import uuid

import pytest

from hicache_core.storage.manifest import read_manifests
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.types import BackendContext
from tests.page_path import world as world_module
from tests.page_path.world import make_world


def test_a_store_that_a_cache_has_opened_says_what_its_namespace_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = world_module.KVSpec.mha(
        num_layers=2, num_heads=1, head_dim=64, dtype="float32", fingerprint="tiny-test-model"
    )
    monkeypatch.setattr(world_module, "SPEC", spec)
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
