"""Page keys: the native digests, their pure twin and hashlib over the same bytes."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Callable, Iterator
from hashlib import sha256

from benchmarks.harness import Row, measure
from hicache_core.kv import _page_keys_py
from hicache_core.kv import keys as page_keys

TABLE = "page keys"
PAGE_SIZES = (1, 16, 64)


def rate(
    name: str, n_tokens: int, fn: Callable[[], object], repeat: int, **facts: str | None
) -> Row:
    """A row in tokens per second.

    Args:
        name: of the row.
        n_tokens: tokens that one call of ``fn`` processes.
        fn: what to measure.
        repeat: number of samples.
        facts: ``baseline``, ``target`` and ``note`` of the row.
    """
    fn()
    wall, cpu = measure(fn, repeat=repeat, number=3)
    return Row(
        table=TABLE,
        name=name,
        unit="M tokens/s",
        samples=[n_tokens / s / 1e6 for s in wall],
        cpu_samples=[n_tokens / s / 1e6 for s in cpu if s > 0],
        baseline=facts.get("baseline"),
        target=facts.get("target"),
        note=facts.get("note") or "",
    )


def rows(quick: bool) -> Iterator[Row]:
    """Every row of the table."""
    n_tokens = 20_000 if quick else 100_000
    repeat = 5 if quick else 25
    tokens = os.urandom(4 * n_tokens)
    plain = "hashlib, one hash of all bytes"
    note = "no chain, no copies: the floor of SHA-256 itself"
    yield rate(plain, n_tokens, lambda: sha256(tokens).digest(), repeat, note=note)
    for page_size in PAGE_SIZES:
        is_main = page_size == 64
        name = f"page {page_size}"
        if page_keys.IMPLEMENTATION != "pure-python":
            yield rate(
                f"{name}, native",
                n_tokens,
                lambda: page_keys.page_digests(tokens, page_size),  # noqa: B023 - called at once
                repeat,
                baseline=plain,
                target="≥ 205" if is_main else None,
                note=page_keys.IMPLEMENTATION,
            )
        yield rate(
            f"{name}, pure Python",
            n_tokens,
            lambda: _page_keys_py.page_digests(tokens, page_size, b""),  # noqa: B023 - likewise
            repeat,
            baseline=plain,
            target="≥ 90" if is_main else None,
        )
    digests = page_keys.page_digests(tokens, 64)
    yield rate(
        "page 64, digests to object keys",
        n_tokens,
        lambda: page_keys.object_keys("0123456789abcdef", digests),
        repeat,
    )
    ids = [random.randrange(150_000) for _ in range(n_tokens)]
    yield rate("pack a list of ints", n_tokens, lambda: page_keys.pack_tokens(ids), repeat)
    yield rate(
        "pack a list of ints, pure Python", n_tokens, lambda: _page_keys_py.pack_ids(ids), repeat
    )
    packed = array("I", ids)
    yield rate("pack a uint32 array", n_tokens, lambda: page_keys.pack_tokens(packed), repeat)
    narrow = array("q", ids)
    yield rate("pack an int64 array", n_tokens, lambda: page_keys.pack_tokens(narrow), repeat)
