"""Objects of one adapter never answer another whose bytes mean something else."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from hicache_core.integrations.foreign.namespace import ForeignNamespace
from tests.unit.integrations.foreign_world import NBYTES, bytes_in, memory, opened, page_of

texts = st.sampled_from(["", "a", "b", "sglang", "vllm", "layer_first", "name:m", '","'])
values = st.one_of(texts, st.integers(0, 3), st.booleans(), st.none(), st.lists(texts, max_size=2))
details = st.dictionaries(st.sampled_from(["dtype", "pool", "kv_rank", "salt"]), values)
namespaces = st.builds(
    ForeignNamespace,
    engine=texts,
    engine_version=texts,
    model=texts,
    layout=texts,
    page_size=st.integers(1, 3),
    object_nbytes=st.sampled_from([0, NBYTES]),
    details=details,
)
hashes = st.binary(min_size=1, max_size=40)


def meaning(namespace: ForeignNamespace) -> str:
    """All that decides the bytes of a page, told apart as JSON does."""
    fields = [
        getattr(namespace, name)
        for name in ("engine", "model", "layout", "page_size", "object_nbytes", "details")
    ]
    return json.dumps(fields, sort_keys=True)


@given(one=namespaces, other=namespaces)
def test_two_namespaces_are_one_if_and_only_if_their_pages_mean_the_same(
    one: ForeignNamespace, other: ForeignNamespace
) -> None:
    assert (one.digest == other.digest) == (meaning(one) == meaning(other))
    assert replace(one, engine_version="another").digest == one.digest


@given(namespace=namespaces, one=hashes, other=hashes)
def test_each_hash_has_a_key_of_its_own(
    namespace: ForeignNamespace, one: bytes, other: bytes
) -> None:
    assert (namespace.key(one) == namespace.key(other)) == (one == other)
    assert namespace.key(one).startswith(f"{namespace.digest}/")
    if len(one) == 32:
        assert namespace.key(one) == f"{namespace.digest}/{one.hex()}"


@given(writer=namespaces, reader=namespaces, page_hash=hashes)
def test_what_one_layout_stored_is_a_miss_for_every_other(
    writer: ForeignNamespace, reader: ForeignNamespace, page_hash: bytes
) -> None:
    assume(meaning(writer) != meaning(reader))
    store = opened(memory(), direct=True)
    assert store.write([writer.key(page_hash)], [page_of(b"\1" * NBYTES)]).mask == [True]
    page = page_of(bytes(NBYTES))
    assert store.exists([reader.key(page_hash)]).mask == [False]
    assert store.read([reader.key(page_hash)], [page]).mask == [False]
    assert bytes_in(page) == bytes(NBYTES)
    assert store.read([writer.key(page_hash)], [page]).mask == [True]
    store.close()
