"""Decode offload: what is generated goes to storage, and the host is free again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hicache_core.types import CachedTokens
from tests.engine.world import (
    PAGE_SIZE,
    SteppedEngine,
    cache_config,
    greedy,
    plain,
    prompt_of,
    stepped_engine,
)


def on_file(path: Path, **changes: Any) -> Any:
    """A cache whose storage others can open, too."""
    return cache_config(hicache_storage_backend="file", extra={"path": str(path)}, **changes)


def used_host_pages(it: SteppedEngine) -> int:
    """Host pages that are not free."""
    host = it.cache.snapshot().host
    assert host is not None
    return host.used_pages


def test_host_pages_of_a_decode_are_free_once_stored_and_the_next_turn_finds_all(
    tmp_path: Path,
) -> None:
    prompt = prompt_of(22)
    config = on_file(tmp_path, hicache_host_retention="free_once_stored")
    with stepped_engine(cache=config, offload_stride=1) as it:
        asked = it.ask(prompt, greedy(40))
        it.run_until(lambda: len(it.tokens(asked)) == 30)
        stored_pages = it.cache.counters.stored_pages
        it.run()
        assert it.tokens(asked) == plain(it.loaded, prompt, 40)
        history = prompt + list(it.tokens(asked))
        assert it.cache.flush(20.0)
        it.cache.check_integrity()
        n_pages = (len(history) - 1) // PAGE_SIZE  # the last token was never computed
        assert stored_pages > 22 // PAGE_SIZE, "while decoding, not only at the end"
        assert it.cache.counters.stored_pages == n_pages
        assert used_host_pages(it) == 0
    with stepped_engine(cache=on_file(tmp_path)) as other:
        longer = history + prompt_of(5, seed=3)
        asked = other.ask(longer)
        other.run()
        assert other.last(asked).cached == CachedTokens(storage=n_pages * PAGE_SIZE)
        assert other.tokens(asked) == plain(other.loaded, longer, 8)
