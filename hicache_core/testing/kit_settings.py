"""Sizes and time limits of the kit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KitSettings:
    """Sizes and bounds of the rules; the defaults are the full kit.

    Attributes:
        large_nbytes: the largest object.
        batch_pages: pages of a large batch.
        batch_page_nbytes: size of each page of a large batch.
        leak_operations: operations between the two counts of descriptors, threads and memory.
        reopenings: how often a backend is opened and closed when looking for leaks.
        n_threads: threads that use one backend at once.
        race_nbytes: size of the objects that are read while they are written or deleted.
        race_s: how long each race between threads or processes goes on.
        kills: how often a writing process is killed.
        reclaim_s: a key that a killed process was writing can be stored again within this time.
        full_nbytes: how much is written to a small store to fill it.
        quota_nbytes: what a namespace may take in a store with a quota.
        ttl_s: how long objects live in a store where they expire, and pins that are to end.
        examples: runs of the state machine.
        steps: steps of each run.
        rule_s: a rule that takes longer has hung; long rules have a multiple of it.
        answer_s: with its server gone, a backend answers or raises within this time.
        recover_s: with its server back, a backend works again within this time.
    """

    large_nbytes: int = 32 << 20
    batch_pages: int = 128
    batch_page_nbytes: int = 256 << 10
    leak_operations: int = 10_000
    reopenings: int = 20
    n_threads: int = 8
    race_nbytes: int = 1 << 20
    race_s: float = 1.0
    kills: int = 5
    reclaim_s: float = 45.0
    full_nbytes: int = 256 << 20
    quota_nbytes: int = 1 << 20
    ttl_s: float = 2.0
    examples: int = 50
    steps: int = 40
    rule_s: float = 60.0
    answer_s: float = 10.0
    recover_s: float = 30.0

    @property
    def arena_nbytes(self) -> int:
        """Memory for pages that are alive at once, where it has to be registered beforehand."""
        largest = max(self.large_nbytes, self.batch_pages * self.batch_page_nbytes)
        return 4 * largest + self.n_threads * 8 * self.race_nbytes + (128 << 20)


FULL = KitSettings()
"""What ``hicache conformance`` runs."""

QUICK = KitSettings(
    batch_page_nbytes=32 << 10,
    leak_operations=3000,
    reopenings=5,
    race_nbytes=64 << 10,
    race_s=0.2,
    kills=2,
    full_nbytes=64 << 20,
    examples=10,
    steps=20,
)
"""What ``StorageBackendTests`` and ``hicache conformance --quick`` run: every rule, shorter."""
