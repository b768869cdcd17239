"""Which chunks a server of LMCache counts as stored."""

from __future__ import annotations

from hicache_core.integrations.lmcache.held import HeldChunks


def test_a_chunk_that_is_held_adds_nothing_when_it_is_stored_again() -> None:
    held = HeldChunks[str]()
    assert held.add({"a": 3, "b": 5}) == ([3, 5], {})
    assert held.add({"b": 5, "c": 7}) == ([0, 7], {})
    assert held.remove(["b", "unknown"]) == {"b": 5}
    assert held.remove(["b"]) == {}
    assert held.add({"b": 5}) == ([5], {})


def test_beyond_the_limit_the_least_recently_used_chunks_are_forgotten() -> None:
    held = HeldChunks[str](3)
    held.add({"a": 1, "b": 2, "c": 3})
    held.touch(["a", "unknown"])
    held.add({"b": 2})
    assert held.add({"d": 4, "e": 5}) == ([4, 5], {"c": 3, "a": 1})
    assert held.remove("abcde") == {"b": 2, "d": 4, "e": 5}
    assert held.add({"v": 1, "w": 2, "x": 3, "y": 4}) == ([1, 2, 3, 4], {"v": 1})


def test_what_was_stored_since_the_store_was_asked_stays() -> None:
    """The answer to an older question knows nothing of it."""
    held = HeldChunks[str]()
    held.add({"a": 10})
    asked = held.n_additions
    held.add({"b": 20})
    assert held.remove(["a", "b", "c"], asked) == {"a": 10}
    held.add({"a": 10, "b": 20})
    assert held.remove(["a", "b"], asked) == {}
    assert held.remove(["b"], held.n_additions) == {"b": 20}
    assert held.remove(["a", "a"]) == {"a": 10}
