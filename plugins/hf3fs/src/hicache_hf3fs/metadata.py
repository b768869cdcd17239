"""The contract of a metadata store: which slot is bound to which key, and until when.

A slot of a slab is in one of these states. From the third it moves to the fourth by time alone.

    bound       to a key; leased while a process may be reading it
    reserved    by a writer, until it publishes or the reservation expires
    quarantined no longer bound, but a lease on it has not ended
    free        in all other cases

A generation consists of the time of the reservation and a random number. So it never repeats, not
even after the store was lost and rebuilt, and the age of an object is known from its slot.

    ms since 1970, 42 bits | random, 20 bits
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from hicache_core.storage.base import Finding

RANDOM_BITS = 20


class Slot(NamedTuple):
    """A place in a slab, and the generation that its header and footer must contain."""

    slab: str
    number: int
    generation: int


class Binding(NamedTuple):
    """The slot of an object, and its length."""

    slot: Slot
    nbytes: int


class Wanted(NamedTuple):
    """An object to be stored."""

    key: str
    nbytes: int


class Written(NamedTuple):
    """An object that was written to a reserved slot."""

    key: str
    nbytes: int
    slot: Slot


class Found(NamedTuple):
    """A complete object that a scan found in a slab."""

    number: int
    generation: int
    key: str
    nbytes: int


class Totals(NamedTuple):
    """The number of slots of a slab by state; the rest is free."""

    n_slots: int
    bound: int
    held: int  # reserved or quarantined


class Limits(NamedTuple):
    """Times in seconds, and the maximum bytes of a namespace, as in the configuration."""

    timeout_s: float
    lease_s: float
    write_lease_s: float
    ttl_s: float | None = None
    namespace_quota_nbytes: int | None = None


class SlabUnknown(LookupError):
    """The slab is not registered: it is new, or the metadata were lost."""


def new_generation(now_s: float) -> int:
    """Returns a number that no slot has had before; ``now_s`` is in seconds since 1970."""
    return int(now_s * 1000) << RANDOM_BITS | secrets.randbits(RANDOM_BITS)


def oldest_generation(now_s: float, ttl_s: float | None) -> int:
    """Returns the first generation younger than ``ttl_s``; objects of lower ones are expired."""
    return 0 if ttl_s is None else max(0, int((now_s - ttl_s) * 1000) + 1) << RANDOM_BITS


class MetadataStore(ABC):
    """Binds slots to keys, for all processes that share the slabs.

    No method finds an object that is older than ``ttl_s``; its slot becomes free with the next
    reservation.

    Threads: every method may be called from any thread. Each is atomic, and raises ``BackendError``
    if the store cannot answer.
    """

    where: str
    """The store's address without secrets, for messages."""

    @abstractmethod
    def open(self) -> None:
        """Connects, and creates what is missing."""

    @abstractmethod
    def close(self) -> None:
        """Disconnects."""

    def trouble(self) -> str:
        """Returns why it has become unusable while open; empty if it is usable."""
        return ""

    def restart_log(self) -> None:  # noqa: B027 - a server has a disk of its own
        """Frees the space of the log, when the disk is full."""

    @abstractmethod
    def n_slots(self, slab: str) -> int | None:
        """Returns the number of slots of a slab; None if it is not registered."""

    @abstractmethod
    def register(self, slab: str, n_slots: int, found: Sequence[Found]) -> None:
        """Registers a slab with the objects found in it; only raises ``n_slots`` of a known one.

        Args:
            slab: its name.
            n_slots: number of its slots.
            found: the objects in it; ignored if the slab is known.
        """

    @abstractmethod
    def lookup(self, keys: Sequence[str], lease_s: float | None = None) -> list[Binding | None]:
        """Looks up objects, and leases their slots: none is reused for ``lease_s`` seconds.

        Args:
            keys: of the objects.
            lease_s: None for that of the configuration.

        Returns:
            The binding of each key; None if it is absent.
        """

    def remembered(self, keys: Sequence[str]) -> list[Binding] | None:  # noqa: ARG002 - see below
        """Returns the binding of every key as it was lately, without asking the store.

        A binding may have changed since, which ``unchanged`` finds out. Its slot is leased as by
        ``lookup``.

        Returns:
            None if a key is not remembered, or its lease ends too soon. By default nothing is.
        """
        return None

    @abstractmethod
    def leading(self, keys: Sequence[str]) -> int:
        """Returns how many leading keys are bound; leases nothing."""

    @abstractmethod
    def present(self, keys: Sequence[str]) -> list[bool]:
        """Returns for each key whether it is bound; leases nothing."""

    @abstractmethod
    def unchanged(self, keys: Sequence[str], bindings: Sequence[Binding]) -> list[bool]:
        """Returns for each key whether it still has this binding."""

    @abstractmethod
    def reserve(self, slab: str, wanted: Sequence[Wanted]) -> list[Slot | None]:
        """Reserves slots for the leading objects; evicts others if needed.

        The least recently used objects are evicted first, pinned ones last, and none of ``wanted``.
        A leased slot is not reused, but its object is evicted if its namespace must shrink.

        Returns:
            A slot for each object, None for one that is stored already. The list is shorter than
            ``wanted`` if there is no further slot, or no further space in the namespace.

        Raises:
            SlabUnknown: the slab was never registered, or the metadata were lost.
        """

    @abstractmethod
    def publish(self, written: Sequence[Written]) -> list[bool]:
        """Binds written objects, in order.

        Returns:
            For each whether it is bound: not if the reservation has expired, or the namespace has
            become full.
        """

    @abstractmethod
    def release(self, slots: Sequence[Slot]) -> None:
        """Releases reserved slots."""

    @abstractmethod
    def delete(self, keys: Sequence[str], generations: Sequence[int] | None = None) -> int:
        """Unbinds ``keys``, or only those with these generations; returns how many there were."""

    @abstractmethod
    def keys(self, prefix: str) -> Iterator[str]:
        """Yields every bound key that starts with ``prefix``."""

    @abstractmethod
    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """Pins ``keys`` for ``ttl_s`` seconds, 0 ends that; returns how many are bound."""

    @abstractmethod
    def usage(self) -> Mapping[str, int]:
        """Returns the bytes of bound objects by namespace."""

    @abstractmethod
    def totals(self, slab: str) -> Totals:
        """Returns the number of a slab's slots by state."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Checks that every used slot is in exactly one state and that bytes add up.

        Raises:
            IntegrityError: the message says what is wrong.
        """

    def findings(self) -> Iterator[Finding]:
        """Yields further findings for ``hicache doctor``."""
        return iter(())

    def attach(self, slab: str, n_slots: int, scan: Callable[[], Iterable[Found]]) -> bool:
        """Registers a slab; an unknown one with the objects that ``scan`` finds.

        Slots can be reserved only after the registration, so nothing changes during the scan.

        Args:
            slab: its name.
            n_slots: number of its slots.
            scan: returns the objects in it; called only for an unknown slab.

        Returns:
            Whether objects were found that the store did not know.
        """
        known = self.n_slots(slab)
        if known is not None and known >= n_slots:
            return False
        found = list(scan()) if known is None else []
        self.register(slab, n_slots, found)
        return bool(found)
