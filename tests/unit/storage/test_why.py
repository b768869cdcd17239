"""Each reason for a miss is told from the others, on every kind of store."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hicache_redis import RedisBackend, RedisConfig

from hicache_core.kv.keys import (
    chain_seed,
    describe_namespace,
    object_keys,
    pack_tokens,
    page_digests,
)
from hicache_core.kv.spec import KVSpec
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.manifest import Manifest, read_manifests
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.storage.why import Answer, Cause, Difference, Question, why
from hicache_core.types import BackendContext, Namespace
from tests.servers.valkey import Valkey, running
from tests.unit.manifests import write_manifest

PAGE_SIZE = 4
SPEC = KVSpec.mha(num_layers=2, num_heads=2, head_dim=8, dtype="bfloat16", fingerprint="m1")
K, V = SPEC.components
TOKENS = pack_tokens(range(1, 31))  # seven pages and two tokens
DEFAULT = Namespace()
SALTED = Namespace(cache_salt="tenant-a")
CONTEXT = BackendContext("0" * 16)


def manifest_of(
    spec: KVSpec = SPEC, page_size: int = PAGE_SIZE, layout: str = "page_first"
) -> Manifest:
    return Manifest.of(describe_namespace(spec.identity(), page_size, layout))


MANIFEST = manifest_of()


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with running() as server:
        yield server


@pytest.fixture(params=["memory", "file", "redis"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, server: Valkey
) -> Iterator[StorageBackend]:
    """An open store without seals; each kind that can list its keys."""
    backend: StorageBackend
    if request.param == "memory":
        backend = MemoryBackend(MemoryConfig(share=uuid.uuid4().hex), CONTEXT)
    elif request.param == "file":
        backend = FileBackend(FileConfig(path=tmp_path / "store", io_threads=1), CONTEXT)
    else:
        server.call("FLUSHALL")
        backend = RedisBackend(RedisConfig.model_validate({"url": server.url}), CONTEXT)
    backend.open()
    with contextlib.closing(backend):
        yield backend


def keys_of(manifest: Manifest, request: Namespace = DEFAULT) -> list[str]:
    page_size = manifest.page_size
    whole = TOKENS[: len(TOKENS) // (4 * page_size) * 4 * page_size]
    return object_keys(manifest.namespace, page_digests(whole, page_size, chain_seed(request)))


def put(store: StorageBackend, keys: Sequence[str], manifest: Manifest = MANIFEST) -> None:
    """Stores pages as a cache does, and the manifest of the cache."""
    sealed = SealedBackend(store)
    payload_nbytes = manifest.object_nbytes - HEADER_NBYTES
    for key in keys:
        sealed.set(key, key.encode().ljust(payload_nbytes))
    assert write_manifest(sealed, manifest, payload_nbytes)


def ask(store: StorageBackend, request: Namespace = DEFAULT) -> Answer:
    others = {n: m for n, m in read_manifests(store).items() if n != MANIFEST.namespace}
    question = Question(TOKENS, PAGE_SIZE, MANIFEST.namespace, request, MANIFEST, others)
    return why(store, question)


def cause_of(answer: Answer) -> Cause | None:
    return None if answer.miss is None else answer.miss.cause


def replace_object(store: StorageBackend, key: str, value: bytes) -> None:
    store.delete([key])
    store.set(key, value)


def test_a_prompt_that_is_stored_is_no_miss(store: StorageBackend) -> None:
    put(store, keys_of(MANIFEST))
    answer = ask(store)
    assert (answer.n_pages, answer.n_stored, answer.n_present, answer.miss) == (7, 7, 7, None)


def test_an_empty_store_never_had_it(store: StorageBackend) -> None:
    answer = ask(store)
    assert (answer.n_stored, cause_of(answer)) == (0, Cause.NEVER_STORED)


def test_the_first_page_that_is_missing_is_named(store: StorageBackend) -> None:
    put(store, keys_of(MANIFEST)[:3])
    answer = ask(store)
    assert answer.miss is not None
    assert (answer.n_stored, answer.miss.page, answer.miss.key) == (3, 3, keys_of(MANIFEST)[3])
    assert answer.miss.cause is Cause.NEVER_STORED


def test_a_page_that_has_pages_behind_it_was_there_once(store: StorageBackend) -> None:
    put(store, keys_of(MANIFEST))
    store.delete([keys_of(MANIFEST)[2]])
    answer = ask(store)
    assert (answer.n_stored, answer.n_present, cause_of(answer)) == (2, 6, Cause.GONE)


def test_damage_is_told_by_kind_and_left_alone(store: StorageBackend) -> None:
    keys = keys_of(MANIFEST)
    put(store, keys)
    good = [bytes(store.get(key) or b"") for key in keys]
    flipped, version = bytearray(good[2]), bytearray(good[2])
    flipped[-1] ^= 1
    version[4] ^= 0xFF
    for damage, cause in [
        (bytes(flipped), Cause.CORRUPT),
        (bytes(version), Cause.WRONG_VERSION),
        (good[2][:-1], Cause.WRONG_LENGTH),
        (good[2][:30], Cause.WRONG_LENGTH),
        (good[5], Cause.FOREIGN),
    ]:
        replace_object(store, keys[2], damage)
        answer = ask(store)
        assert answer.miss is not None
        assert (answer.n_stored, answer.miss.cause) == (2, cause)
        assert answer.miss.found_at == (keys[5] if cause is Cause.FOREIGN else "")
        assert bytes(store.get(keys[2]) or b"") == damage


def test_a_salt_that_nobody_stored_with_is_found_out(store: StorageBackend) -> None:
    put(store, keys_of(MANIFEST))
    given = replace(SALTED, lora_id="adapter")
    miss = ask(store, given).miss
    assert miss is not None
    assert (miss.cause, miss.request) == (Cause.OTHER_REQUEST_NAMESPACE, Namespace())
    put(store, keys_of(MANIFEST, SALTED))
    miss = ask(store, given).miss
    assert miss is not None
    assert (miss.request, miss.found_at) == (SALTED, keys_of(MANIFEST, SALTED)[0])


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            manifest_of(replace(SPEC, model_fingerprint="m2")),
            Difference("model_fingerprint", "m1", "m2"),
        ),
        (manifest_of(layout="layer_first"), Difference("layout", "page_first", "layer_first")),
        (manifest_of(page_size=8), Difference("page_size", 4, 8)),
        (
            manifest_of(
                KVSpec.mha(num_layers=2, num_heads=2, head_dim=8, dtype="float16", fingerprint="m1")
            ),
            Difference(
                "components",
                [["k", [2, 8], "bfloat16"], ["v", [2, 8], "bfloat16"]],
                [["k", [2, 8], "float16"], ["v", [2, 8], "float16"]],
            ),
        ),
        (
            manifest_of(replace(SPEC, components=(replace(K, layers=(1,)), V))),
            Difference(
                "components",
                [["k", [2, 8], "bfloat16"], ["v", [2, 8], "bfloat16"]],
                [["k", [2, 8], "bfloat16", [1]], ["v", [2, 8], "bfloat16"]],
            ),
        ),
    ],
    ids=["model", "layout", "page_size", "dtype", "layers of a component"],
)
def test_another_cache_stored_it_and_differs_in_one_field(
    store: StorageBackend, other: Manifest, difference: Difference
) -> None:
    put(store, keys_of(other), other)
    miss = ask(store).miss
    assert miss is not None
    assert (miss.page, miss.cause) == (0, Cause.OTHER_STORAGE_NAMESPACE)
    assert (miss.found_at, miss.differences) == (keys_of(other)[0], (difference,))
    assert miss.request is None


def test_a_shard_of_heads_differs_in_heads_and_shapes(store: StorageBackend) -> None:
    other = manifest_of(SPEC.shard(heads=(0, 1)))
    put(store, keys_of(other), other)
    miss = ask(store).miss
    assert miss is not None
    assert [difference.name for difference in miss.differences] == ["components", "heads"]


def test_a_page_of_another_size_is_found_in_the_middle(store: StorageBackend) -> None:
    """Our page 4 starts at token 16; theirs of 8 tokens is number 2."""
    put(store, keys_of(MANIFEST)[:4])
    other = manifest_of(page_size=8)
    put(store, keys_of(other), other)
    miss = ask(store).miss
    assert miss is not None
    assert (miss.page, miss.found_at) == (4, keys_of(other)[2])


def test_both_namespaces_may_differ_at_once(store: StorageBackend) -> None:
    other = manifest_of(layout="layer_first")
    put(store, keys_of(other), other)
    miss = ask(store, SALTED).miss
    assert miss is not None
    assert (miss.cause, miss.request) == (Cause.OTHER_STORAGE_NAMESPACE, Namespace())


def test_a_namespace_without_a_manifest_is_found_and_not_explained(store: StorageBackend) -> None:
    other = manifest_of(layout="layer_first")
    put(store, keys_of(other), other)
    store.delete([key for key in store.list_keys("") if key not in keys_of(other)])
    miss = ask(store).miss
    assert miss is not None
    assert (miss.cause, miss.differences) == (Cause.OTHER_STORAGE_NAMESPACE, ())


def test_a_prompt_shorter_than_a_page_has_no_page(store: StorageBackend) -> None:
    answer = why(store, Question(TOKENS[:8], PAGE_SIZE, MANIFEST.namespace))
    assert (answer.n_pages, answer.miss) == (0, None)
