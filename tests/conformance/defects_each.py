"""Wrong backends: their calls that answer for each key are wrong. Each docstring names the rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hicache_core.errors import BackendFull
from hicache_core.storage.segments import nbytes_of, scatter
from hicache_core.types import Page
from tests.conformance.right import RightBackend


class EachStopsAtGap(RightBackend):
    """exists_each_sees_all"""

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        n_present = self.batch_exists(keys)
        return [n < n_present for n in range(len(keys))]


class AnswersInNumbers(RightBackend):
    """exists_each_sees_all"""

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        return [int(self.exists(key)) for key in keys]  # type: ignore[misc]  # that is the defect


class AnswersForPresentOnly(RightBackend):
    """exists_each_sees_all"""

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        return [True for key in keys if self.exists(key)]


class ReadsLeadingOnly(RightBackend):
    """get_each_fills_all"""

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        n_filled = self.batch_get(keys, pages)
        return [n < n_filled for n in range(len(keys))]


class ClaimsWhatItDidNotRead(RightBackend):
    """get_each_fills_all"""

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        self.batch_get(keys, pages)
        return self.exists_each(keys)


class HitsOfEachMoveUp(RightBackend):
    """get_each_fills_all"""

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        hits = [key for key in keys if self.exists(key)]
        self.batch_get(hits, pages[: len(hits)])
        return super().exists_each(keys)


class CutsEachToItsPage(RightBackend):
    """get_each_fills_all"""

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        values = [self.get(key) for key in keys]
        for value, page in zip(values, pages, strict=True):
            if value is not None:
                scatter(bytes(value).ljust(nbytes_of(page))[: nbytes_of(page)], page)
        return [value is not None for value in values]


class StoresEachUpToAKnownKey(RightBackend):
    """set_each_stores_all"""

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        n_new = next((n for n, key in enumerate(keys) if self.exists(key)), len(keys))
        self.batch_set(keys[:n_new], pages[:n_new])
        return [True] * len(keys)


class SpoilsEachOfItsPages(RightBackend):
    """set_each_stores_all"""

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        mask = super().set_each(keys, pages)
        for segment in [s for page in pages for s in page if s.nbytes]:
            segment[0] ^= 1
        return mask


class NoneIsAnError(RightBackend):
    """empty_each"""

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        if not keys:
            raise ValueError("no keys")
        return super().get_each(keys, pages)


class FillsEachOnce(RightBackend):
    """same_key_twice_each"""

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        once = dict(zip(keys, pages, strict=True))
        filled = dict(zip(once, super().get_each(list(once), list(once.values())), strict=True))
        return [filled[key] for key in keys]


class ForgetsEachBehindHundred(RightBackend):
    """large_batch_with_gaps"""

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        return [*super().exists_each(keys[:100]), *[False] * len(keys[100:])]


class StoresEachOrSaysSo(RightBackend):
    """full_store_each"""

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        super().set_each(keys, pages)
        return [True] * len(keys)


class RaisesWhenFull(RightBackend):
    """full_store_each"""

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        mask = super().set_each(keys, pages)
        if not all(mask):
            raise BackendFull("no room for all of them")
        return mask


class BoundsNowAndThen(RightBackend):
    """bounds_calls_stays"""

    n_asked = 0

    def bounds_calls(self) -> bool:
        self.n_asked += 1
        return self.n_asked % 2 == 0


class ShowsNoPage(RightBackend):
    """sealed_each"""

    def get_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], _arrived: Callable[[int], bool]
    ) -> Sequence[bool]:
        """Reads without asking whether a page is right."""
        return self.get_each(keys, pages)

    def set_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> Sequence[bool]:
        """As it should."""
        for n in range(len(keys)):
            leaving(n)
        return self.set_each(keys, pages)


class ShowsPagesTooLate(RightBackend):
    """sealed_each"""

    def get_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> Sequence[bool]:
        """As it should."""
        mask = self.get_each(keys, pages)
        return [is_filled and arrived(n) for n, is_filled in enumerate(mask)]

    def set_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> Sequence[bool]:
        """Shows a page when its bytes are stored already."""
        mask = self.set_each(keys, pages)
        for n in range(len(keys)):
            leaving(n)
        return mask
