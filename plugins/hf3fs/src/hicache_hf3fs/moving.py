"""What one call moves: slots that are read, with memory for header and footer, and written."""

from __future__ import annotations

from typing import NamedTuple

from hicache_core.types import Page
from hicache_hf3fs.metadata import Binding, Slot, Wanted, Written
from hicache_hf3fs.page_io import Transfer
from hicache_hf3fs.slab import FOOTER_NBYTES, HEADER_NBYTES, Slab, pack_footer, pack_header


class SlotRead(NamedTuple):
    """A slot that is being read, with the memory for its header and footer."""

    transfer: Transfer
    header: bytearray
    footer: bytearray
    binding: Binding

    def holds(self, key: str) -> bool:
        """Whether what was read is the object of ``key`` that the metadata speaks of."""
        generation = self.binding.slot.generation
        return self.footer == pack_footer(generation) and self.header == pack_header(
            key, self.binding.nbytes, generation
        )


class SlotWrite(NamedTuple):
    """A page of the call that goes to a reserved slot."""

    position: int
    written: Written
    buffers: list[memoryview]


def slot_content(want: Wanted, slot: Slot, page: Page) -> list[memoryview]:
    """What stands in the slot: header, object, footer."""
    header = pack_header(want.key, want.nbytes, slot.generation)
    return [memoryview(header), *page, memoryview(pack_footer(slot.generation))]


def transfer_of(slab: Slab, number: int, nbytes: int, buffers: list[memoryview]) -> Transfer:
    """The way of one object between a slot and ``buffers``."""
    total = HEADER_NBYTES + nbytes + FOOTER_NBYTES
    return Transfer(slab.fd, number * slab.slot_nbytes, total, buffers)
