"""Units of a pool that calls still use after their owner has let go of them."""

from __future__ import annotations

from array import array
from collections import Counter

from hicache_core.errors import IntegrityError
from hicache_core.pools.allocator import PageAllocator


class PinnedUnits:
    """The allocator of a pool, and the units that copies or stores use. Owner thread only.

    ::

        free ── allocate ──> owned ── free ──> free
                               │  pinned: some call uses it
                               └─ free ──> let go ── the last unpin ──> free

    So whoever owns a unit may give it up at any time, and a call that uses it never meets
    another prefix's bytes in it.

    Attributes:
        n_lent: units that calls fill, and that belong to no node yet.
    """

    def __init__(self, allocator: PageAllocator) -> None:
        """Nothing is pinned yet."""
        self._allocator = allocator
        self._pins: Counter[int] = Counter()
        self._let_go: set[int] = set()
        self.n_lent = 0

    @property
    def n_units(self) -> int:
        """All units of the pool."""
        return self._allocator.n_pages

    @property
    def n_free(self) -> int:
        """Units that ``allocate`` can hand out."""
        return self._allocator.n_free

    @property
    def n_let_go(self) -> int:
        """Units that nobody owns, but some call still uses."""
        return len(self._let_go)

    def allocate(self, n: int) -> array[int]:
        """Takes ``n`` free units, or none at all.

        Raises:
            PoolExhausted: fewer are free.
        """
        return self._allocator.allocate(n)

    def free(self, units: array[int]) -> None:
        """Gives units back; those that are pinned become free with their last ``unpin``."""
        if not self._pins:
            self._allocator.free(units)
            return
        pinned = {unit for unit in units if unit in self._pins}
        if pinned & self._let_go:
            raise IntegrityError(f"units {sorted(pinned & self._let_go)} were freed twice")
        self._let_go |= pinned
        self._allocator.free(array("i", [unit for unit in units if unit not in pinned]))

    def pin(self, units: array[int]) -> None:
        """Says that a call begins to use owned ``units``."""
        self._pins.update(units)

    def unpin(self, units: array[int]) -> None:
        """Takes back one ``pin`` of ``units``.

        Raises:
            IntegrityError: one of them is not pinned.
        """
        freed = array("i")
        for unit in units:
            if unit not in self._pins:
                raise IntegrityError(f"unit {unit} is not pinned")
            self._pins[unit] -= 1
            if not self._pins[unit]:
                del self._pins[unit]
                if unit in self._let_go:
                    self._let_go.discard(unit)
                    freed.append(unit)
        self._allocator.free(freed)

    def are_idle(self, units: array[int]) -> bool:
        """Whether no call uses any of ``units``."""
        return not self._pins or self._pins.keys().isdisjoint(units)

    def check_integrity(self, n_owned: int, name: str, *, exactly: bool) -> None:
        """Checks that every unit is free or has an owner.

        Args:
            n_owned: units whose owners are known.
            name: of the pool, for the message.
            exactly: nobody else owns units of it.

        Raises:
            IntegrityError: says what does not add up.
        """
        self._allocator.check_integrity()
        n_allocated = self.n_units - self.n_free
        n_known = n_owned + self.n_let_go + self.n_lent
        if n_known > n_allocated or (exactly and n_known != n_allocated):
            raise IntegrityError(
                f"{name}: {n_owned} units are owned, {self.n_lent} are being filled and "
                f"{self.n_let_go} are only read, but {n_allocated} are allocated"
            )
