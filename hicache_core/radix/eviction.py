"""The eviction policies by name. A policy decides which pages leave a tier first."""

from __future__ import annotations

from hicache_core.errors import ConfigError
from hicache_core.radix.arc import ARC
from hicache_core.radix.order import EvictionPolicy
from hicache_core.radix.ranked import FIFO, LFU, LRU, SLRU, Priority
from hicache_core.radix.s3fifo import S3FIFO

_CLASSES: tuple[type[EvictionPolicy], ...] = (LRU, LFU, FIFO, SLRU, Priority, S3FIFO, ARC)
_POLICIES = {policy.name: policy for policy in _CLASSES}
POLICY_NAMES = tuple(_POLICIES)
"""The names of all policies in the configuration."""


def eviction_policy(name: str) -> EvictionPolicy:
    """The policy of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _POLICIES:
        raise ConfigError(f"no eviction policy {name!r}; allowed: {', '.join(POLICY_NAMES)}")
    return _POLICIES[name]()
