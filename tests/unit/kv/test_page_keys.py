"""Rules of the page keys, held on the native code, its portable path and the pure twin alike."""

from __future__ import annotations

import doctest
import hashlib
import os
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.errors import InvalidTokens, SpecError
from hicache_core.kv import _page_keys_py
from hicache_core.kv import keys as page_keys
from hicache_core.kv.keys import (
    chain_seed,
    object_keys,
    pack_tokens,
    page_digests,
    storage_namespace,
)
from hicache_core.types import Namespace

try:
    from hicache_core.kv import _page_keys
except ImportError:
    _page_keys = None  # type: ignore[assignment]

Digests = Callable[[bytes, int, bytes], bytes]
DIGESTS: dict[str, Digests] = {"pure": _page_keys_py.page_digests}
PACKS: dict[str, Callable[[list[int]], bytes]] = {"pure": _page_keys_py.pack_ids}
if _page_keys is not None:
    DIGESTS |= {"native": _page_keys.page_digests, "portable": _page_keys.page_digests_portable}
    PACKS["native"] = _page_keys.pack_ids

each_digests = pytest.mark.parametrize("digests", DIGESTS.values(), ids=DIGESTS.keys())
each_pack = pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())


def expected(tokens: bytes, page_size: int, parent: bytes) -> bytes:
    """The specification, one page after the other."""
    out = b""
    for i in range(len(tokens) // (4 * page_size)):
        page = tokens[i * 4 * page_size : (i + 1) * 4 * page_size]
        parent = hashlib.sha256(parent + page).digest()
        out += parent
    return out


@each_digests
def test_published_vectors(digests: Digests) -> None:
    """Tokens 1 to 8 in pages of 4 have the digests that SGLang computes."""
    assert object_keys("ns", digests(pack_tokens(range(1, 9)), 4, b"")) == [
        "ns/cf97adeedb59e05bfd73a2b4c2a8885708c4f4f70c84c64b27120e72ab733b72",
        "ns/4ebfa8a1f3c341517621838c6e1b9aa350307e3f00b3cbd1a07ef740f54396d6",
    ]


@each_digests
@given(
    tokens=st.binary(max_size=200).map(lambda raw: raw * 4),
    page_size=st.integers(1, 70),
    seeded=st.booleans(),
)
def test_digests_are_chained_sha256(
    digests: Digests, tokens: bytes, page_size: int, seeded: bool
) -> None:
    """Every implementation equals hashlib, whatever the page size and where padding falls."""
    parent = hashlib.sha256(b"seed").digest() if seeded else b""
    assert digests(tokens, page_size, parent) == expected(tokens, page_size, parent)


@each_digests
@pytest.mark.parametrize("page_size", [1, 5, 6, 13, 14, 16, 64, 1000])
def test_digests_at_block_boundaries(digests: Digests, page_size: int) -> None:
    """Messages that just fit a SHA-256 block with their padding, or just do not."""
    tokens = os.urandom(4 * page_size * 3 + 4)
    assert digests(tokens, page_size, b"") == expected(tokens, page_size, b"")


@each_digests
def test_threads_share_no_state(digests: Digests) -> None:
    """Long inputs run without the GIL; two threads get each their own digests."""
    inputs = [os.urandom(400_000) for _ in range(4)]
    results: dict[int, bytes] = {}

    def work(i: int) -> None:
        results[i] = digests(inputs[i], 64, b"")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: expected(inputs[i], 64, b"") for i in range(4)}


def test_a_chain_may_be_continued() -> None:
    """The last digest is the parent of the pages that follow."""
    tokens = pack_tokens(range(64))
    head = page_digests(tokens[:128], 8)
    assert head + page_digests(tokens[128:], 8, head[-32:]) == page_digests(tokens, 8)


def test_a_short_tail_has_no_digest() -> None:
    assert page_digests(pack_tokens(range(3)), 4) == b""
    assert page_digests(b"", 4) == b""


@pytest.mark.parametrize(
    ("tokens", "page_size", "parent", "error", "message"),
    [
        (b"abc", 4, b"", InvalidTokens, "3 bytes, not a multiple of 4"),
        (b"", 0, b"", SpecError, "page_size is 0"),
        (b"", 4, b"x", SpecError, "parent digest is 1 bytes"),
    ],
)
def test_bad_arguments_are_named(
    tokens: bytes, page_size: int, parent: bytes, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        page_digests(tokens, page_size, parent)


@pytest.mark.skipif(_page_keys is None, reason="the native module is not built here")
def test_native_code_checks_its_own_arguments() -> None:
    """Whoever calls the native module past the wrapper still cannot make it read outside."""
    for page_size, parent in ((0, b""), (-1, b""), (2**62, b""), (4, b"short")):
        with pytest.raises(ValueError, match=r"page_size|parent"):
            _page_keys.page_digests(b"12345678", page_size, parent)
    with pytest.raises(TypeError):
        _page_keys.pack_ids({1: 2})  # type: ignore[arg-type]


@each_pack
@given(ids=st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_ids_are_packed_little_endian(pack: Callable[[list[int]], bytes], ids: list[int]) -> None:
    assert pack(ids) == b"".join(i.to_bytes(4, "little") for i in ids)


@each_pack
@pytest.mark.parametrize("bad", [-1, 2**32, 2**70, True, 1.0, None, "1"])
def test_bad_ids_are_refused(pack: Callable[[list[int]], bytes], bad: object) -> None:
    with pytest.raises((TypeError, OverflowError)):
        pack([1, bad])  # type: ignore[list-item]


@each_pack
def test_a_list_that_shrinks_is_no_danger(pack: Callable[[list[int]], bytes]) -> None:
    """An id's __index__ may run any code, also one that empties the list."""
    ids: list[int] = []

    class Evil:
        def __index__(self) -> int:
            ids.clear()
            return 1

    ids += [Evil(), 2, 3]  # type: ignore[list-item]
    with pytest.raises((TypeError, RuntimeError, IndexError)):
        pack(ids)


@pytest.mark.parametrize(
    "ids",
    [
        (1, 2, 2**32 - 1),
        np.array([1, 2, 2**32 - 1], dtype=np.uint32),
        np.array([1, 2, 2**32 - 1], dtype=np.int64),
        np.array([1, 0, 2, 0, 2**32 - 1], dtype=np.uint64)[::2],
        array("Q", [1, 2, 2**32 - 1]),
        torch.tensor([1, 2, 2**32 - 1]),
        [np.int64(1), np.uint8(2), np.int64(2**32 - 1)],
        bytearray(b"\1\0\0\0\2\0\0\0\xff\xff\xff\xff"),
        memoryview(b"\1\0\0\0\2\0\0\0\xff\xff\xff\xff"),
    ],
    ids=lambda ids: f"{type(ids).__name__}-{getattr(ids, 'dtype', '')}",
)
def test_every_kind_of_ids_packs_alike(ids: object) -> None:
    assert pack_tokens(ids) == b"\1\0\0\0\2\0\0\0\xff\xff\xff\xff"


def test_narrow_arrays_are_ids_not_bytes() -> None:
    """uint8 ids of an array are widened; only bytes-like objects count as packed."""
    assert pack_tokens(np.array([7, 8], dtype=np.uint8)) == pack_tokens([7, 8])
    assert pack_tokens(array("h", [7, 8])) == pack_tokens([7, 8])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, -1], "token 1 is -1"),
        ([2**32], "token 0 is 4294967296"),
        ([1, True], "token 1 is True, a bool"),
        ([0.5], "token 0 is 0.5, a float"),
        ("text", "tokenizer"),
        (b"12345", "5 bytes"),
        (7, "a int"),
        (np.array([0, -5], dtype=np.int32), "token 1 is -5"),
        (np.array([0, -5], dtype=np.int64), "token 1 is -5"),
        (np.array([-5], dtype=np.int8), "token 0 is -5"),
        (np.array([2**40], dtype=np.int64), "token 0 is 1099511627776"),
        (np.array([1.0]), "format 'd'"),
        (np.array([True]), "format"),
        (np.array([[1]]), "2-d"),
        (torch.tensor([[1]]), "2-d"),
        (torch.tensor([-1]), "token 0 is -1"),
    ],
    ids=str,
)
def test_bad_ids_are_named(ids: object, message: str) -> None:
    with pytest.raises(InvalidTokens, match=message):
        pack_tokens(ids)


def test_the_default_namespace_has_no_seed() -> None:
    assert chain_seed(Namespace()) == b""


def test_seeds_follow_sglang() -> None:
    """SHA-256 of the tag, then per field 0x00, or 0x01, the length as u64 and the text."""
    salted = b"sglang-cache-namespace-v1\0\1" + (6).to_bytes(8, "little") + "salté".encode()
    assert chain_seed(Namespace(cache_salt="salté")) == hashlib.sha256(salted).digest()
    both = b"sglang-cache-namespace-v1\1\1\0\0\0\0\0\0\0a\1" + bytes(8)
    assert chain_seed(Namespace(extra_key="a", cache_salt="")) == hashlib.sha256(both).digest()


def test_a_lora_is_a_third_field() -> None:
    text = b"sglang-cache-namespace-v1\0\0\1" + (2).to_bytes(8, "little") + b"l1"
    assert chain_seed(Namespace(lora_id="l1")) == hashlib.sha256(text).digest()


def test_no_two_namespaces_share_a_seed() -> None:
    values = [None, "", "a", "b"]
    seeds = {
        chain_seed(Namespace(key, salt, lora))
        for key in values
        for salt in values
        for lora in values
    }
    assert len(seeds) == 64


def test_the_storage_namespace_follows_every_fact() -> None:
    """Another page size, layout or identity is another namespace; key order is not."""
    base = storage_namespace({"a": 1, "b": [1, 2]}, 64, "page_first")
    assert len(base) == 16
    assert int(base, 16) >= 0
    assert base == storage_namespace({"b": (1, 2), "a": 1}, 64, "page_first")
    others = {
        storage_namespace({"a": 2, "b": [1, 2]}, 64, "page_first"),
        storage_namespace({"a": 1, "b": [2, 1]}, 64, "page_first"),
        storage_namespace({"a": 1, "b": [1, 2]}, 32, "page_first"),
        storage_namespace({"a": 1, "b": [1, 2]}, 64, "layer_first"),
    }
    assert len(others | {base}) == 5


def test_the_storage_namespace_is_stable_across_processes() -> None:
    """The vector of docs/key-spec.md, computed under another hash seed."""
    code = (
        "from hicache_core.kv.keys import storage_namespace as s;"
        "print(s({'dtype': 'bfloat16', 'layers': [0, 2]}, 64, 'page_first'))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    text = (
        '{"format":1,"identity":{"dtype":"bfloat16","layers":[0,2]},'
        '"layout":"page_first","page_size":64}'
    )
    assert out.stdout.decode().strip() == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_twin_can_be_forced() -> None:
    env = {**os.environ, "HICACHE_PURE_PYTHON": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from hicache_core import page_keys; print(page_keys.IMPLEMENTATION)"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert out.stdout.decode().strip() == "pure-python"
    assert page_keys.IMPLEMENTATION in ("x86-sha", "portable", "pure-python")


def test_the_published_specification_holds() -> None:
    """Every vector of docs/key-spec.md is what the code computes."""
    page = Path(page_keys.__file__).parents[2] / "docs" / "key-spec.md"
    results = doctest.testfile(str(page), module_relative=False)
    assert results.attempted > 8
    assert results.failed == 0


def test_index_and_keys_need_no_torch() -> None:
    code = "import sys, hicache_core.radix; assert 'torch' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
