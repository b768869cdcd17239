"""Policies: what an operator may change about a cache while requests run."""

from __future__ import annotations

from dataclasses import dataclass

from hicache_core.controller.prefetch_policy import PrefetchPolicy
from hicache_core.controller.write_policy import WritePolicy


@dataclass(slots=True)
class Policies:
    """Looked up whenever something is decided, so a change counts from the next decision on.

    Owner thread only; the ranks change alike.

    Attributes:
        write: when pages go down.
        prefetch: how long a request waits for storage.
        prefetch_threshold: tokens that must be missing before storage is asked.
    """

    write: WritePolicy
    prefetch: PrefetchPolicy
    prefetch_threshold: int
