"""Results of the tree's calls, as frozen data."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

from hicache_core.radix.node import Node


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix, in whole pages: a run on the device, then a run on the host.

    Attributes:
        device_pages: device page ids of the first run.
        host_pages: host page ids of the second run, which the device does not have.
        device_node: deepest node of the first run.
        node: deepest node of both runs.
        page_size: tokens per page.
    """

    device_pages: array[int]
    host_pages: array[int]
    device_node: Node
    node: Node
    page_size: int

    def device_part(self) -> Match:
        """The match without its host run."""
        return replace(self, host_pages=array("i"), node=self.device_node)

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
        return self.n_device_tokens + self.n_host_tokens


@dataclass(frozen=True, slots=True)
class InsertResult:
    """The result of an insert.

    Attributes:
        node: deepest node of the inserted prefix.
        pages: the device page ids that the tree has for it, one for each whole page.
        duplicates: pages of the caller that the tree did not take; the caller frees them.
        n_known_pages: pages that were on the device before.
        new_nodes: nodes that have got device pages by it, top to bottom.
    """

    node: Node
    pages: array[int]
    duplicates: array[int]
    n_known_pages: int
    new_nodes: list[Node]


@dataclass(frozen=True, slots=True)
class Dropped:
    """Pages that the tree has given up. The caller frees them.

    Attributes:
        device_pages: ids in the device pool.
        host_pages: ids in the host pool.
    """

    device_pages: array[int]
    host_pages: array[int]
