"""Which rules run for a variant of a backend: those that can see the code in which it differs.

Some classes are tested in several variants that share most of their code. One variant of each kind
runs every rule that applies; any other one runs the rules that a table here names, with the reason.

| kind | runs every rule | runs a selection |
|---|---|---|
| chain | memory and files, written behind | the three other chains |
| guard | the memory backend that it guards | the guarded memory backend |
| class for SGLang | the one with ``interface_v1`` | the two on the generic path |

``behaves_like_memory`` stands in each table, since a sequence of all calls may meet what a table
has overlooked; and ``test_features`` runs for every variant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from hicache_core.testing.rules.rule import Rule
from hicache_core.testing.suite import StorageBackendTests

Selection = Mapping[str, tuple[str, ...]]
"""What is the variant's own -> the rules that fail if it is wrong."""

_EVERYTHING = {"all calls together": ("behaves_like_memory",)}

WRITTEN_THROUGH: Selection = {
    "batch_set stores in one link after the other, and answers the least of their counts": (
        *("batch_round_trip", "empty_batch", "large_batch", "re_put", "set_only_reads"),
        *("set_each_stores_all", "empty_each"),
    ),
    "batch_set hands the caller's memory to each link, and copies none of it": ("set_copies",),
    "two stores change one after the other while somebody reads": (
        *("threads_do_not_mix", "all_or_nothing", "re_put_stays_readable", "delete_while_reading"),
    ),
    "both links are up to date at once: no copy is on its way that would have to end first": (
        *("delete_removes", "clears_by_prefix", "usage_by_namespace", "counts_in_stats"),
    ),
    **_EVERYTHING,
}
"""A chain written through, beside the same chain written behind."""

TWO_OF_A_KIND: Selection = {
    "every key is in two stores that can do the same, and counts once": (
        *("lists_by_prefix", "clears_by_prefix", "usage_by_namespace", "pin_counts_present"),
    ),
    "two links of one class have figures of their own": ("counts_in_stats",),
    **_EVERYTHING,
}
"""A chain of two memory backends, beside memory and files, written in the same way."""

GUARDED: Selection = {
    "each call is handed on with its arguments, and its answer back": (
        *("get_after_set", "batch_round_trip", "open_twice", "close_twice"),
        *("exists_each_sees_all", "get_each_fills_all", "set_each_stores_all"),
        "bounds_calls_stays",
    ),
    "a key that failed to load counts as absent until it is stored or loaded, and only that key": (
        *("miss_is_an_answer", "exists_counts_leading", "get_counts_leading", "re_put"),
        *("namespaces_are_apart", "wrong_size_is_a_miss", "instances_share"),
        *("delete_removes", "evicted_after_exists"),
    ),
    "the time that a call may take follows from the size of its first page": (
        *("empty_batch", "empty_object", "empty_each"),
    ),
    "errors are judged, and raised again as they are": ("use_after_close",),
    "breaker, histograms and failed keys belong to all threads": (
        *("threads_do_not_mix", "delete_while_reading"),
    ),
    "what is remembered of calls and of failed keys is bounded": ("no_leaks",),
    "what the backend can do beside the contract is handed on": (
        *("lists_by_prefix", "clears_by_prefix", "counts_in_stats", "usage_by_namespace"),
        *("pin_counts_present", "says_what_it_can"),
    ),
    **_EVERYTHING,
}
"""A guard around a memory backend, beside the memory backend."""

GENERIC_BATCH: Selection = {
    "get and batch_get read from tensors of one page each, of any size": (
        *("get_after_set", "miss_is_an_answer", "get_counts_leading", "wrong_size_is_a_miss"),
        *("stays_in_its_page", "get_gives_its_own_bytes", "same_key_twice"),
        *("get_each_fills_all", "same_key_twice_each"),
    ),
    "set and batch_set copy each page into a tensor": (
        *("batch_round_trip", "segments_of_every_shape", "re_put", "set_copies", "set_only_reads"),
        "set_each_stores_all",
    ),
    "there are no slots: neither their number nor their size is a limit": (
        *("empty_batch", "large_batch", "empty_object", "tiny_objects", "large_object"),
        *("empty_each", "large_batch_with_gaps"),
    ),
    "the class has a batch_exists of its own": ("exists_counts_leading", "exists_each_sees_all"),
    "threads meet in the class, and nowhere before": ("threads_do_not_mix",),
    "each call allocates what the other path takes from its slots": ("no_leaks",),
    **_EVERYTHING,
}
"""A class for SGLang with batch methods, beside one with ``interface_v1``."""

GENERIC: Selection = {
    "batch_get asks for one page after the other": (
        *("batch_round_trip", "segments_of_every_shape", "get_counts_leading", "same_key_twice"),
        *("empty_batch", "empty_object", "large_batch"),
        *("exists_each_sees_all", "get_each_fills_all", "empty_each"),
    ),
    "batch_set stores one page after the other, up to the first that is refused": (
        *("re_put", "set_copies", "set_only_reads", "set_each_stores_all"),
    ),
    "what get answers is the stored tensor itself, as long as it happens to be": (
        *("wrong_size_is_a_miss", "stays_in_its_page", "get_gives_its_own_bytes"),
    ),
    **_EVERYTHING,
}
"""A class for SGLang without batch methods, beside one that has them."""


class VariantTests(StorageBackendTests):
    """Runs the selected rules instead of every rule that applies."""

    selection: ClassVar[Selection]

    @classmethod
    def rules(cls) -> Sequence[Rule]:
        """The selected ones, in the order of the kit."""
        applying = super().rules()
        selected = {rule_id for ids in cls.selection.values() for rule_id in ids}
        unknown = selected - {rule.id for rule in applying}
        assert not unknown, f"{cls.__name__} selects what does not apply: {sorted(unknown)}"
        return [rule for rule in applying if rule.id in selected]
