"""A store says itself what its namespaces stand for."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from hicache_core.kv.keys import describe_namespace, storage_namespace
from hicache_core.kv.spec import KVSpec
from hicache_core.storage.base import Buffer, StorageBackend
from hicache_core.storage.manifest import (
    Manifest,
    decode,
    encode,
    manifest_key,
    namespaces,
    read_manifest,
    read_manifests,
)
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import SealedBackend
from hicache_core.types import BackendContext
from tests.unit.manifests import write_manifest
from tests.unit.specs_by_layer import BY_LAYER

SPEC = KVSpec.mha(num_layers=2, num_heads=2, head_dim=8, dtype="bfloat16", fingerprint="café")
DESCRIBED = describe_namespace(SPEC.identity(), 16, "page_first")
MANIFEST = Manifest.of(DESCRIBED)
PAYLOAD_NBYTES = SPEC.page_nbytes(16)


@pytest.fixture
def store() -> Iterator[MemoryBackend]:
    backend = MemoryBackend(MemoryConfig(share=uuid.uuid4().hex), BackendContext("0" * 16))
    backend.open()
    yield backend
    backend.close()


def test_a_manifest_has_the_namespace_that_it_describes() -> None:
    assert MANIFEST.namespace == storage_namespace(SPEC.identity(), 16, "page_first")
    assert MANIFEST.page_size == 16
    assert MANIFEST.object_nbytes == 64 + PAYLOAD_NBYTES
    assert MANIFEST.fields["model_fingerprint"] == "café"
    assert MANIFEST.fields["layout"] == "page_first"


@pytest.mark.parametrize("spec", BY_LAYER.values(), ids=BY_LAYER)
def test_it_knows_the_length_of_objects_whose_layers_differ(spec: KVSpec) -> None:
    described = describe_namespace(spec.identity(), 16, "page_first")
    assert Manifest.of(described).object_nbytes == 64 + spec.page_nbytes(16)


def test_what_is_encoded_is_decoded() -> None:
    payload = encode(MANIFEST, PAYLOAD_NBYTES)
    assert payload is not None
    assert len(payload) == PAYLOAD_NBYTES
    assert decode(MANIFEST.namespace, payload) == MANIFEST


@pytest.mark.parametrize("payload", [b"", b"\xff" * 500, b"[1]" + b" " * 400, b"{}"])
def test_what_is_no_manifest_is_none(payload: bytes) -> None:
    assert decode(MANIFEST.namespace, payload) is None
    assert decode(Manifest.of(payload.decode(errors="replace").rstrip()).namespace, payload) is None


def test_a_manifest_of_another_namespace_is_none() -> None:
    assert decode("0" * 16, DESCRIBED.encode()) is None


def test_it_is_as_long_as_any_object(store: MemoryBackend) -> None:
    sealed = SealedBackend(store)
    assert write_manifest(sealed, MANIFEST, PAYLOAD_NBYTES)
    value = store.get(manifest_key(MANIFEST.namespace))
    assert value is not None
    assert len(memoryview(value)) == MANIFEST.object_nbytes
    assert read_manifests(store) == {MANIFEST.namespace: MANIFEST}


def test_a_page_that_is_too_small_has_no_manifest(store: MemoryBackend) -> None:
    assert not write_manifest(SealedBackend(store), MANIFEST, len(DESCRIBED.encode()) - 1)
    assert namespaces(store) == []


def test_a_damaged_manifest_is_none_and_stays_where_it_is(store: MemoryBackend) -> None:
    write_manifest(SealedBackend(store), MANIFEST, PAYLOAD_NBYTES)
    key = manifest_key(MANIFEST.namespace)
    for damage in (b"", b"short", bytearray(store.get(key) or b"")):
        if len(damage) > 64:
            damage[100] ^= 1  # type: ignore[index]
        store.delete([key])
        store.set(key, damage)
        assert read_manifest(store, MANIFEST.namespace) is None
        assert store.get(key) == damage


def test_namespaces_without_a_manifest_are_known_by_their_keys(store: MemoryBackend) -> None:
    store.set("00000000000000aa/" + "0" * 64, b"x")
    store.set("no page key", b"x")
    assert read_manifests(store) == {"00000000000000aa": None}


class Mute(StorageBackend):
    """A store that can neither list nor count."""

    name = "mute"

    def get(self, key: str) -> Buffer | None:
        return None

    def exists(self, key: str) -> bool:
        return False

    def set(self, key: str, value: Buffer) -> None:
        raise AssertionError("nothing is stored here")


def test_a_store_that_cannot_list_knows_no_namespace() -> None:
    assert namespaces(Mute(Mute.Config(), BackendContext("0" * 16))) == []
