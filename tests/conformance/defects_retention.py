"""Wrong backends that keep objects too long or not long enough; each names the rule it breaks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import inf

from hicache_core.storage.base import Buffer
from tests.conformance.right import STORES, RichBackend


class UsageCountsWrites(RichBackend):
    """usage_by_namespace"""

    written: defaultdict[str, int]

    def open(self) -> None:
        super().open()
        self.written = defaultdict(int)

    def set(self, key: str, value: Buffer) -> None:
        super().set(key, value)
        self.written[key.partition("/")[0]] += len(value)

    def usage(self) -> Mapping[str, int]:
        return self.written


class ExistsForgetsTheTtl(RichBackend):
    """expires"""

    def exists(self, key: str) -> bool:
        return super().exists(key) or (self.is_open and key in self.__dict__.get("seen", ()))

    def set(self, key: str, value: Buffer) -> None:
        super().set(key, value)
        if self.settings.ttl_s is not None:
            self.__dict__.setdefault("seen", set()).add(key)


class OneQuotaForAll(RichBackend):
    """quota_by_namespace"""

    def within(self, key: str) -> list[str]:
        return list(STORES[self.settings.store])


class PinCountsAbsent(RichBackend):
    """pin_counts_present"""

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        super().pin(keys, ttl_s)
        return len(keys)


class PinsNothing(RichBackend):
    """pinned_goes_last"""

    def is_pinned(self, key: str) -> bool:
        return False


class PinsForEver(RichBackend):
    """pin_ends"""

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        return super().pin(keys, inf if ttl_s else 0)


class PinsHard(RichBackend):
    """all_pinned_makes_room"""

    def victim(self, key: str) -> str:
        others = [other for other in self.within(key) if other != key]
        return next((k for k in others if not self.is_pinned(k)), key)
