"""Rules about several instances and several processes on one store."""

from __future__ import annotations

import random
import time

from hicache_core.testing.features import Feature
from hicache_core.testing.harness import Harness, expect, expect_hit
from hicache_core.testing.rules.rule import RuleBook

_book = RuleBook("segments_of_every_shape")
rule = _book.rule
RULES = _book.rules

_PAGE = (64, 4032)
_NBYTES = 4096


@rule(
    "What one instance has stored, another finds as soon as set returns.",
    requires=Feature.SECOND_INSTANCE,
)
def instances_share(h: Harness) -> None:
    ours, theirs = h.keys(3, "ours"), h.keys(3, "theirs")
    other = h.another()
    h.put(h.backend, ours, _PAGE)
    n_present = other.batch_exists(ours)
    expect(
        n_present == len(ours),
        f"a second instance sees {n_present} of {len(ours)} stored pages; where only the same"
        " instance or process is meant to find them, say so by the scope",
    )
    h.expect_pages(other, ours, _PAGE)
    h.put(other, theirs, _PAGE)
    h.expect_pages(h.backend, theirs, _PAGE)


@rule(
    "close() of one instance leaves the others working.",
    requires=Feature.SECOND_INSTANCE,
    needs=("instances_share",),
)
def close_leaves_the_others(h: Harness) -> None:
    keys = h.keys(3)
    h.put(h.backend, keys[:2], _PAGE)
    other = h.another()
    h.expect_pages(other, keys[:2], _PAGE)
    h.forget(other)
    other.close()
    h.expect_pages(h.backend, keys[:2], _PAGE)
    h.put(h.backend, keys[2:], _PAGE)
    h.expect_pages(h.backend, keys, _PAGE)


@rule(
    "Two processes read what the other has stored, in turn and at the same time.",
    requires=Feature.SECOND_PROCESS,
    needs=("instances_share", "re_put"),
)
def two_processes(h: Harness) -> None:
    backend, peer = h.backend, h.peer()
    ours, theirs, both = h.keys(8, "ours"), h.keys(8, "theirs"), h.keys(8, "both")
    h.put(backend, ours, _PAGE)
    _expect_all_hits(peer.check(ours, _NBYTES), "stored here, read in a second process")
    peer.put(theirs, _NBYTES)
    h.expect_pages(backend, theirs, _PAGE)
    peer.start_writing(both * 8, _NBYTES)
    for _ in range(8):
        h.put(backend, both, _PAGE)
        h.leading_hits(backend, both, _PAGE)  # a page that the other is storing may be a miss yet
    _expect_all_hits(peer.check(both, _NBYTES), "stored by both processes at once")
    for key in both:
        expect_hit(backend, key, _NBYTES)


def _expect_all_hits(verdicts: list[str], how: str) -> None:
    wrong = [verdict for verdict in verdicts if verdict != "hit"]
    expect(not wrong, f"{len(wrong)} of {len(verdicts)} pages {how}: {'; '.join(set(wrong))}")


@rule(
    "A process that is killed while it stores leaves whole objects or none. Its keys can "
    "be stored again, at once or after a while, and are then found.",
    requires=Feature.SECOND_PROCESS,
    needs=("two_processes",),
    patience=5,
)
def killed_writer(h: Harness) -> None:
    nbytes = h.nbytes(h.settings.race_nbytes)
    draw = random.Random(0)
    for kill in range(h.settings.kills):
        keys = h.keys(256, f"kill {kill}")
        peer = h.peer()
        peer.start_writing(keys, nbytes)
        time.sleep(draw.uniform(0.0, 0.02))
        peer.kill()
        for key in keys:
            value = h.backend.get(key)
            if value is not None:
                expect_hit(h.backend, key, nbytes)
        _store_again(h, keys[:4], nbytes)


def _store_again(h: Harness, keys: list[str], nbytes: int) -> None:
    """Stores ``keys`` in as many batches as it takes; what a batch says it stored is there."""
    stop_at = time.monotonic() + h.settings.reclaim_s
    n_stored = 0
    while n_stored < len(keys):
        left = keys[n_stored:]
        n_stored += h.backend.batch_set(left, [h.filled(key, (nbytes,)) for key in left])
        h.expect_pages(h.backend, keys[:n_stored], (nbytes,))
        expect(
            n_stored == len(keys) or time.monotonic() < stop_at,
            f"{len(keys) - n_stored} keys that a killed process was writing cannot be stored again"
            f" within {h.settings.reclaim_s:g} s",
        )
