"""Both pools against a dumb model: pages are filled, copied, stored, read back, freed, reused."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hicache_core.copies import native
from hicache_core.copies.base import Transfer
from hicache_core.copies.direct import DirectTransfer
from hicache_core.copies.kernel import KernelTransfer
from hicache_core.copies.native import NativeTransfer
from hicache_core.copies.queues import InlineQueue
from hicache_core.errors import IntegrityError, PoolExhausted
from hicache_core.kv.spec import Component, KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from hicache_core.storage.segments import join, scatter

PAGE_SIZE = 2
DEVICE_PAGES = 5
HOST_PAGES = 4

# Components of different widths, one of them narrow: offsets that are wrong by a row are seen.
ALIKE = KVSpec.mha(
    num_layers=2, num_heads=1, head_dim=3, dtype="int8", fingerprint="f", scale_dtype="float32"
)
# And some that only some layers have: offsets that are wrong by a layer are seen.
SPEC = replace(
    ALIKE,
    components=(
        Component("k_1", (1, 4), "float32", (1,)),
        *ALIKE.components,
        Component("indexer_k", (5,), "int8", (0,)),
    ),
)
TRANSFERS: list[type[Transfer]] = [DirectTransfer, KernelTransfer]
if native.IS_BUILT:
    TRANSFERS.append(NativeTransfer)

LABELS = st.integers(0, 30)
PICKS = st.integers(0, 1000)


@cache
def rows(label: int, component: int, layer: int) -> torch.Tensor:
    """What a page with this label holds there: uint8 (page_size, row_nbytes).

    Args:
        label: of the page.
        component: index of the component.
        layer: index among the layers that have it.
    """
    nbytes = SPEC.components[component].row_nbytes
    content = random.Random(f"{label} {component} {layer}").randbytes(PAGE_SIZE * nbytes)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(PAGE_SIZE, nbytes)


class PoolsMachine(RuleBasedStateMachine):
    """A label says what a page holds; the model is a label for each page in use, and no more."""

    layout = "page_first"
    transfer_class: type[Transfer] = DirectTransfer

    def __init__(self) -> None:
        super().__init__()
        self.device = DevicePool(SPEC, PAGE_SIZE, DEVICE_PAGES)
        self.host = HostPool(SPEC, PAGE_SIZE, HOST_PAGES, LAYOUTS[self.layout])
        self.transfer = self.transfer_class(self.device, self.host, InlineQueue())
        self.transfer.open()
        self.on_device: dict[int, int] = {}
        self.on_host: dict[int, int] = {}
        self.objects: dict[int, bytes] = {}
        self.rows_of_host = [self.host.rows(c) for c in range(len(SPEC.components))]

    def device_rows(self, component: int, layer: int, page: int) -> torch.Tensor:
        row = self.device.buffers[component][layer][page].contiguous()
        return row.view(torch.uint8).view(PAGE_SIZE, -1)

    @rule(labels=st.lists(LABELS, min_size=1, max_size=3))
    def compute(self, labels: list[int]) -> None:
        """The engine takes device pages and fills them."""
        if len(labels) > DEVICE_PAGES - len(self.on_device):
            with pytest.raises(PoolExhausted):
                self.device.allocator.allocate(len(labels))
            return
        pages = self.device.allocator.allocate(len(labels))
        assert not set(pages) & set(self.on_device)
        for page, label in zip(pages, labels, strict=True):
            for component, layers in enumerate(self.device.buffers):
                for layer, buffer in enumerate(layers):
                    typed = rows(label, component, layer).view(buffer.dtype)
                    buffer[page].copy_(typed.view(buffer[page].shape))
            self.on_device[page] = label

    @precondition(lambda self: self.on_device)
    @rule(picks=st.lists(PICKS, min_size=1, max_size=3))
    def back_up(self, picks: list[int]) -> None:
        """Device pages, in any order and one perhaps twice, to as many host pages."""
        known = sorted(self.on_device)
        sources = [known[pick % len(known)] for pick in picks]
        if len(sources) > HOST_PAGES - len(self.on_host):
            with pytest.raises(PoolExhausted):
                self.host.allocator.allocate(len(sources))
            return
        pages = self.host.allocator.allocate(len(sources))
        assert not set(pages) & set(self.on_host)
        self.transfer.to_host(type(pages)("i", sources), pages)
        for page, source in zip(pages, sources, strict=True):
            self.on_host[page] = self.on_device[source]

    @precondition(lambda self: self.on_host)
    @rule(picks=st.lists(PICKS, min_size=1, max_size=3))
    def load_back(self, picks: list[int]) -> None:
        """Host pages, one perhaps twice, to as many device pages."""
        known = sorted(self.on_host)
        sources = [known[pick % len(known)] for pick in picks]
        if len(sources) > DEVICE_PAGES - len(self.on_device):
            return
        pages = self.device.allocator.allocate(len(sources))
        self.transfer.to_device(type(pages)("i", sources), pages)
        for page, source in zip(pages, sources, strict=True):
            self.on_device[page] = self.on_host[source]

    @precondition(lambda self: self.on_host)
    @rule(pick=PICKS)
    def store(self, pick: int) -> None:
        """A host page becomes an object."""
        page = sorted(self.on_host)[pick % len(self.on_host)]
        value = join(self.host.pages([page])[0])
        assert len(value) == self.host.object_nbytes
        self.objects[self.on_host[page]] = bytes(value)

    @precondition(lambda self: self.objects)
    @rule(pick=PICKS)
    def read(self, pick: int) -> None:
        """An object is read into a host page."""
        if len(self.on_host) == HOST_PAGES:
            return
        label = sorted(self.objects)[pick % len(self.objects)]
        (page,) = self.host.allocator.allocate(1)
        scatter(self.objects[label], self.host.pages([page])[0])
        self.on_host[page] = label

    @rule(data=st.data())
    def write_headers(self, data: st.DataObject) -> None:
        """A header lies beside its page, whatever is written into it."""
        for header, *_ in self.host.pages(range(HOST_PAGES)):
            header[:] = data.draw(st.sampled_from([b"\0", b"\xff"])) * header.nbytes

    @precondition(lambda self: self.on_device)
    @rule(pick=PICKS)
    def free_on_device(self, pick: int) -> None:
        page = sorted(self.on_device)[pick % len(self.on_device)]
        del self.on_device[page]
        self.device.allocator.free([page])
        with pytest.raises(IntegrityError):
            self.device.allocator.free([page])

    @precondition(lambda self: self.on_host)
    @rule(pick=PICKS)
    def free_on_host(self, pick: int) -> None:
        page = sorted(self.on_host)[pick % len(self.on_host)]
        del self.on_host[page]
        self.host.allocator.free([page])
        with pytest.raises(IntegrityError):
            self.host.allocator.free([page])

    @invariant()
    def every_page_in_use_holds_what_its_label_says(self) -> None:
        for component in range(len(SPEC.components)):
            for layer in range(len(self.device.buffers[component])):
                for page, label in self.on_device.items():
                    found = self.device_rows(component, layer, page)
                    assert torch.equal(found, rows(label, component, layer)), ("device", page)
                for page, label in self.on_host.items():
                    found = self.rows_of_host[component][page, layer]
                    assert torch.equal(found, rows(label, component, layer)), ("host", page)

    @invariant()
    def free_and_used_add_up(self) -> None:
        for pool, used in ((self.device, self.on_device), (self.host, self.on_host)):
            pool.allocator.check_integrity()
            assert pool.allocator.n_free == pool.n_pages - len(used)

    def teardown(self) -> None:
        self.transfer.close()
        self.rows_of_host = []
        self.host.close()


@pytest.mark.parametrize("transfer", TRANSFERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_of_both_pools_hold_what_was_put_there(layout: str, transfer: type[Transfer]) -> None:
    machine = type("Machine", (PoolsMachine,), {"layout": layout, "transfer_class": transfer})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=12, stateful_step_count=20, deadline=None)
    )
