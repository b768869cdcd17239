"""Results of the tree's calls, as frozen data."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple

from hicache_core.radix.node import Node
from hicache_core.types import CachedTokens

LACKING = -1
"""The id of a unit that a tier does not have."""


@dataclass(frozen=True, slots=True)
class Units:
    """What a prefix has of one group of layers: its trailing units, in the order of their pages.

    Attributes:
        first: index, from the start of the prefix, of the page that the first unit belongs to. A
            state belongs to the page that ends where it was taken.
        device: unit ids in the group's device pool; ``LACKING`` where only the host has the unit.
        host: unit ids in the group's host pool; ``LACKING`` where the device has the unit.
    """

    first: int
    device: array[int]
    host: array[int]

    @property
    def n_on_host(self) -> int:
        """Units that only the host has."""
        return len(self.host) - self.host.count(LACKING)


@dataclass(frozen=True, slots=True)
class NewUnits:
    """Units that the caller has filled, for ``insert``.

    Attributes:
        first: as ``Units.first``.
        device: unit ids in the group's device pool, consecutive ones; of a state, one.
    """

    first: int
    device: array[int]


# Named tuples: each lookup makes one, and a frozen dataclass takes longer to make.
class Match(NamedTuple):
    """The longest known prefix, in whole pages: a run on the device, then a run on the host.

    Attributes:
        device_pages: device page ids of the first run.
        host_pages: host page ids of the second run, which the device does not have.
        device_node: deepest node of the first run.
        node: deepest node of both runs.
        page_size: tokens per page.
        groups: what each group has at the end of the prefix, in the order of the spec.
        cut_by: name of the group that the prefix would be longer without; empty if none.
        n_uncut_tokens: tokens that the full pages alone would give.
        own: after a load_back, by group, the device units that belong to the caller.
    """

    device_pages: array[int]
    host_pages: array[int]
    device_node: Node
    node: Node
    page_size: int
    groups: tuple[Units, ...] = ()
    cut_by: str = ""
    n_uncut_tokens: int = 0
    own: tuple[array[int], ...] = ()

    @property
    def is_on_device(self) -> bool:
        """Whether nothing has to be loaded from the host."""
        if self.host_pages or not self.groups:
            return not self.host_pages
        return not any(units.n_on_host for units in self.groups)

    @property
    def n_device_tokens(self) -> int:
        """Tokens of the device run."""
        return len(self.device_pages) * self.page_size

    @property
    def n_host_tokens(self) -> int:
        """Tokens of the host run."""
        return len(self.host_pages) * self.page_size

    @property
    def n_tokens(self) -> int:
        """Tokens of both runs."""
        return (len(self.device_pages) + len(self.host_pages)) * self.page_size

    @property
    def n_tokens_from_host(self) -> int:
        """Tokens of the pages of which the host alone has something: the page, or a unit of it."""
        if not self.groups:
            return self.n_host_tokens
        n_on_device, lacking = len(self.device_pages), set[int]()
        for units in self.groups:
            if units.n_on_host:
                numbered = enumerate(units.host, units.first)
                lacking.update(page for page, unit in numbered if unit != LACKING)
        n_units = sum(page < n_on_device for page in lacking)
        return (n_units + len(self.host_pages)) * self.page_size


def cached_tokens(match: Match, loaded: Match, from_storage: int) -> CachedTokens:
    """Cached tokens of a prompt by tier.

    Args:
        match: what the cache had, after storage had delivered.
        loaded: the same after its load to the device.
        from_storage: tokens that storage delivered for the prompt.
    """
    if loaded.n_tokens < match.n_tokens:  # no room on the device for what the host has
        return CachedTokens(device=loaded.n_tokens)
    host = match.n_tokens_from_host
    storage = min(from_storage, host)
    return CachedTokens(match.n_tokens - host, host - storage, storage)


class InsertResult(NamedTuple):
    """The result of an insert.

    Attributes:
        node: deepest node of the inserted prefix.
        pages: the device page ids that the tree has for it, one for each whole page.
        duplicates: pages of the caller that the tree did not take; the caller frees them.
        n_known_pages: pages that were on the device before.
        new_nodes: nodes that have got device pages by it, top to bottom.
        unit_duplicates: by group, units of the caller that the tree did not take; the caller
            frees them.
        units: by group, what the tree has at the end of the prefix.
    """

    node: Node
    pages: array[int]
    duplicates: array[int]
    n_known_pages: int
    new_nodes: list[Node]
    unit_duplicates: tuple[array[int], ...] = ()
    units: tuple[Units, ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """Pages that the tree has given up. The caller frees them.

    Attributes:
        device_pages: ids in the device pool.
        host_pages: ids in the host pool.
    """

    device_pages: array[int]
    host_pages: array[int]
