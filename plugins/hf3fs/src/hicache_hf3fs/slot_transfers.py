"""The transfers of one call: slots to read, with memory for header and footer, and to write."""

from __future__ import annotations

from typing import NamedTuple

from hicache_core.types import Page
from hicache_hf3fs.metadata import Binding, Slot, Wanted, Written
from hicache_hf3fs.page_io import Transfer
from hicache_hf3fs.slab import FOOTER_NBYTES, HEADER_NBYTES, Slab, pack_footer, pack_header


class SlotRead(NamedTuple):
    """A slot that is being read, with memory for its header and footer.

    ``position`` is the index of its page in the call.
    """

    position: int
    transfer: Transfer
    header: bytearray
    footer: bytearray
    binding: Binding

    def holds(self, key: str) -> bool:
        """Returns whether the bytes read are the object of ``key`` that the metadata describes."""
        slot, nbytes = self.binding
        return self.footer == pack_footer(slot.generation) and self.header == pack_header(
            key, nbytes, slot.generation
        )


class SlotWrite(NamedTuple):
    """A page that is written to a reserved slot; ``position`` is its index in the call."""

    position: int
    written: Written
    buffers: list[memoryview]


def slot_content(want: Wanted, slot: Slot, page: Page) -> list[memoryview]:
    """Returns the content of a slot: header, object, footer.

    Args:
        want: the object.
        slot: reserved for it.
        page: its bytes.
    """
    header = pack_header(want.key, want.nbytes, slot.generation)
    return [memoryview(header), *page, memoryview(pack_footer(slot.generation))]


def transfer_of(slab: Slab, number: int, nbytes: int, buffers: list[memoryview]) -> Transfer:
    """Returns the transfer of one object between a slot and ``buffers``.

    Args:
        slab: with the slot.
        number: of the slot.
        nbytes: length of the object.
        buffers: memory of header, object and footer.
    """
    total = HEADER_NBYTES + nbytes + FOOTER_NBYTES
    return Transfer(slab.fd, number * slab.slot_nbytes, total, buffers)
