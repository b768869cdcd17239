"""The rule that everything together behaves like the memory backend."""

from __future__ import annotations

import importlib

from hicache_core.testing.features import Feature
from hicache_core.testing.harness import Harness
from hicache_core.testing.rules.rule import RuleBook

_book = RuleBook(
    *("exists_counts_leading", "get_counts_leading", "empty_batch", "same_key_twice", "re_put"),
    *("set_each_stores_all", "empty_each", "same_key_twice_each"),
    *("empty_object", "tiny_objects", "delete_removes", "evicted_after_exists"),
)
RULES = _book.rules


@_book.rule(
    "Any sequence of calls is answered as by the memory backend.",
    requires=Feature.HYPOTHESIS,
    patience=5,
)
def behaves_like_memory(h: Harness) -> None:
    # By name: hypothesis comes with the extra [testing] only.
    importlib.import_module("hicache_core.testing.stateful").check(h)
