"""The contract of a metadata store: which slot is bound to which key, and until when.

A slot of a slab is in one of these states; only ``now`` moves it from the third to the fourth.

    bound       to a key; leased while somebody may be reading it
    reserved    by a writer, until that writer publishes or its time is over
    quarantined its key is gone, but a lease on it has not ended
    free        everything else

A generation is the time of its reservation and a random number, so that none comes twice, not even
after the store was lost and rebuilt; and so the age of an object is known wherever its slot is.

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
    """A place in a slab, and what the header and footer there must carry."""

    slab: str
    number: int
    generation: int


class Binding(NamedTuple):
    """Where the object of a key lies, and its length."""

    slot: Slot
    nbytes: int


class Wanted(NamedTuple):
    """An object that is to be stored."""

    key: str
    nbytes: int


class Written(NamedTuple):
    """An object that was written to a reserved slot."""

    key: str
    nbytes: int
    slot: Slot


class Found(NamedTuple):
    """A whole object that a scan found in a slab."""

    number: int
    generation: int
    key: str
    nbytes: int


class Totals(NamedTuple):
    """How many slots of a slab are in which state; the rest is free."""

    n_slots: int
    bound: int
    held: int  # reserved or quarantined


class Limits(NamedTuple):
    """Times of a store, in seconds, and the cap on a namespace's bytes, as in the configuration."""

    timeout_s: float
    lease_s: float
    write_lease_s: float
    ttl_s: float | None = None
    namespace_quota_nbytes: int | None = None


class SlabUnknown(LookupError):
    """The store knows nothing of the slab: it is new, or the store was lost."""


def new_generation(now_s: float) -> int:
    """A number that no slot has carried before; ``now_s`` is in seconds since 1970."""
    return int(now_s * 1000) << RANDOM_BITS | secrets.randbits(RANDOM_BITS)


def oldest_generation(now_s: float, ttl_s: float | None) -> int:
    """The first generation that is younger than ``ttl_s``: all below it are of expired objects."""
    return 0 if ttl_s is None else max(0, int((now_s - ttl_s) * 1000) + 1) << RANDOM_BITS


class MetadataStore(ABC):
    """Binds slots to keys, for all processes that share the slabs.

    An object that is older than ``ttl_s`` is none: no method finds it, and its slot is free as soon
    as somebody reserves.

    Threads: every method may be called from any thread. Each is atomic, and raises
    ``BackendError`` if the store cannot answer.
    """

    where: str
    """The store's address without secrets, for messages."""

    @abstractmethod
    def open(self) -> None:
        """Connects; makes what is missing."""

    @abstractmethod
    def close(self) -> None:
        """Disconnects."""

    def trouble(self) -> str:
        """Why it is of no use any more, though it is open; empty if it is well."""
        return ""

    def restart_log(self) -> None:  # noqa: B027 - a server has a disk of its own
        """Lets the room of a log be used again, on a disk that is full."""

    @abstractmethod
    def n_slots(self, slab: str) -> int | None:
        """How many slots the store knows of a slab; None if it does not know the slab."""

    @abstractmethod
    def register(self, slab: str, n_slots: int, found: Sequence[Found]) -> None:
        """Makes a slab known with what was found in it; of a known one only raises ``n_slots``."""

    @abstractmethod
    def lookup(self, keys: Sequence[str], lease_s: float | None = None) -> list[Binding | None]:
        """Where the objects lie. None of these slots is reused for the next ``lease_s`` seconds.

        Without ``lease_s`` it is that of the configuration.
        """

    @abstractmethod
    def leading(self, keys: Sequence[str]) -> int:
        """How many leading keys are bound; grants no lease."""

    @abstractmethod
    def unchanged(self, keys: Sequence[str], bindings: Sequence[Binding]) -> int:
        """How many leading keys are still bound as they were."""

    @abstractmethod
    def reserve(self, slab: str, wanted: Sequence[Wanted]) -> list[Slot | None]:
        """Slots for the leading objects, None for each that is stored already.

        The list ends where the room ended: no slot is free, and none that is bound may go; or the
        namespace is at its cap, and nothing of it may go. The least recently used objects go first,
        those that are pinned last, and none that is in ``wanted``. A slot that is leased is not
        reused; its object goes all the same when its namespace has to shrink.

        Raises:
            SlabUnknown: the slab was never registered, or the store was lost.
        """

    @abstractmethod
    def publish(self, written: Sequence[Written]) -> list[bool]:
        """Binds what was written, in order.

        False where the reservation is no longer the caller's, or the namespace is full by now.
        """

    @abstractmethod
    def release(self, slots: Sequence[Slot]) -> None:
        """Gives reserved slots back."""

    @abstractmethod
    def delete(self, keys: Sequence[str], generations: Sequence[int] | None = None) -> int:
        """Unbinds ``keys``, or those that are bound with these generations; how many there were."""

    @abstractmethod
    def keys(self, prefix: str) -> Iterator[str]:
        """Every bound key that starts with ``prefix``."""

    @abstractmethod
    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """For ``ttl_s`` seconds ``keys`` go last, 0 ends that now; how many of them are bound."""

    @abstractmethod
    def usage(self) -> Mapping[str, int]:
        """Bytes of the bound objects by namespace."""

    @abstractmethod
    def totals(self, slab: str) -> Totals:
        """The states of a slab's slots."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Every used slot of every slab is in exactly one state; bytes by namespace add up.

        Raises:
            IntegrityError: it is not so.
        """

    def findings(self) -> Iterator[Finding]:
        """What ``hicache doctor`` should say of the store beside that it answers."""
        return iter(())

    def attach(self, slab: str, n_slots: int, scan: Callable[[], Iterable[Found]]) -> bool:
        """Makes a slab known, with what ``scan`` finds if the store has not heard of it.

        Nobody can reserve in a slab before it is registered, so the scan sees it at rest.

        Returns:
            Whether anything was found that the store did not know.
        """
        known = self.n_slots(slab)
        if known is not None and known >= n_slots:
            return False
        found = list(scan()) if known is None else []
        self.register(slab, n_slots, found)
        return bool(found)
