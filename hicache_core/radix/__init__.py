"""The prefix index over packed token ids. Imports no torch."""

from hicache_core.radix.eviction import POLICY_NAMES, eviction_policy
from hicache_core.radix.node import Node
from hicache_core.radix.order import EvictionPolicy
from hicache_core.radix.results import Dropped, InsertResult, Match
from hicache_core.radix.tree import RadixTree

__all__ = [
    "POLICY_NAMES",
    "Dropped",
    "EvictionPolicy",
    "InsertResult",
    "Match",
    "Node",
    "RadixTree",
    "eviction_policy",
]
