"""Transfers: byte for byte what a naive loop does, for every layout, io backend and direction."""

from __future__ import annotations

import itertools
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_core.copies import native
from hicache_core.copies.base import CopyLayers, CopyQueue, Ticket, Transfer
from hicache_core.copies.direct import DirectTransfer
from hicache_core.copies.kernel import KernelTransfer
from hicache_core.copies.queues import InlineQueue, ThreadQueue
from hicache_core.errors import IntegrityError
from hicache_core.kv.spec import Component, KVSpec
from hicache_core.pools.device import DevicePool, paged
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from tests.unit.specs_by_layer import BY_LAYER, WITHOUT_COMPONENTS

TRANSFERS: list[type[Transfer]] = [DirectTransfer, KernelTransfer]
if native.IS_BUILT:
    TRANSFERS.append(native.NativeTransfer)
MHA = KVSpec.mha(num_layers=3, num_heads=2, head_dim=8, dtype="bfloat16", fingerprint="f")


class World:
    """Two pools full of random bytes, and a transfer between them."""

    def __init__(
        self,
        kind: type[Transfer],
        layout: str,
        spec: KVSpec = MHA,
        page_size: int = 4,
        queue: CopyQueue | None = None,
    ) -> None:
        self.device = DevicePool.with_groups(spec, page_size, 5, [1] * len(spec.groups))
        self.host = HostPool(spec, page_size, 7, LAYOUTS[layout])
        generator = torch.Generator().manual_seed(1)
        for tensor in self.device_rows() + self.host_rows():
            tensor.copy_(torch.randint(256, tensor.shape, dtype=torch.uint8, generator=generator))
        self.transfer = kind(self.device, self.host, queue or InlineQueue())
        self.transfer.open()

    def device_rows(self) -> list[torch.Tensor]:
        """(n_pages, page_size, row_nbytes) for each component and layer."""
        buffers = itertools.chain.from_iterable(self.device.buffers)
        return [
            b.view(self.device.n_pages, self.device.page_size, -1).view(torch.uint8)
            for b in buffers
        ]

    def host_rows(self) -> list[torch.Tensor]:
        """The same of the host pool."""
        components = range(len(self.host.spec.components))
        return [rows for c in components for rows in self.host.rows(c).unbind(1)]


class WatchedQueue(InlineQueue):
    """Calls ``after`` with the layers of each step that has been copied."""

    def __init__(self) -> None:
        super().__init__()
        self.after: Callable[[range], None] = lambda _layers: None

    def submit(self, steps: list[range], copy: CopyLayers) -> Ticket:
        def watched(layers: range) -> None:
            copy(layers)
            self.after(layers)

        return super().submit(steps, watched)


@contextmanager
def opened(*args: object, **kwargs: object) -> Iterator[World]:
    world = World(*args, **kwargs)  # type: ignore[arg-type]
    try:
        yield world
    finally:
        world.transfer.close()
        world.host.close()


def components_of(n_layers: int) -> st.SearchStrategy[list[Component]]:
    """Of any shape and dtype, each in all layers or in some."""
    some_layers = st.sets(st.integers(0, n_layers - 1), min_size=1).map(sorted).map(tuple)
    component = st.builds(
        Component,
        st.uuids().map(str),
        st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple),
        st.sampled_from(["uint8", "float8_e4m3fn", "bfloat16", "float32"]),
        st.none() | some_layers,
    )
    return st.lists(component, min_size=1, max_size=4, unique_by=lambda c: c.name)


specs = st.integers(1, 3).flatmap(
    lambda n: components_of(n).map(
        lambda components: KVSpec(tuple(components), n, "f", (0, n), (0, 1, 1))
    )
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TRANSFERS)
@settings(max_examples=25, deadline=None)
@given(
    spec=specs,
    page_size=st.integers(1, 5),
    pairs=st.integers(0, 5).flatmap(
        lambda n: st.tuples(st.permutations(range(5)), st.permutations(range(7))).map(
            lambda p: (p[0][:n], p[1][:n])
        )
    ),
    down=st.booleans(),
)
def test_a_transfer_moves_the_named_pages_and_no_other_byte(
    kind: type[Transfer],
    layout: str,
    spec: KVSpec,
    page_size: int,
    pairs: tuple[list[int], list[int]],
    down: bool,
) -> None:
    with opened(kind, layout, spec, page_size) as world:
        device_pages, host_pages = array("i", pairs[0]), array("i", pairs[1])
        device, host = world.device_rows(), world.host_rows()
        expected_device, expected_host = [t.clone() for t in device], [t.clone() for t in host]
        for d, h in zip(*pairs, strict=True):
            for i in range(len(device)):
                if down:
                    expected_host[i][h] = device[i][d]
                else:
                    expected_device[i][d] = host[i][h]
        if down:
            ticket = world.transfer.to_host(device_pages, host_pages)
        else:
            ticket = world.transfer.to_device(host_pages, device_pages)
        assert ticket.wait(10)
        assert ticket.error is None
        assert all(torch.equal(a, b) for a, b in zip(device, expected_device, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(host, expected_host, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TRANSFERS)
def test_layers_arrive_in_order_on_the_copy_thread(kind: type[Transfer], layout: str) -> None:
    with opened(kind, layout, queue=ThreadQueue()) as world:
        pages = array("i", [4, 0, 2])
        ticket = world.transfer.to_device(pages, pages)
        for layer in range(MHA.num_layers):
            ticket.wait_layer(layer)
            for on_device, on_host in zip(world.device_rows(), world.host_rows(), strict=True):
                if on_device.data_ptr() in layer_addresses(world, layer):
                    assert torch.equal(on_device[pages], on_host[pages])
        assert ticket.wait(10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TRANSFERS)
@pytest.mark.parametrize("spec", BY_LAYER.values(), ids=BY_LAYER)
def test_what_a_layer_has_arrives_with_that_layer(
    spec: KVSpec, kind: type[Transfer], layout: str
) -> None:
    queue = WatchedQueue()
    with opened(kind, layout, spec, queue=queue) as world:
        pages, reached = array("i", [4, 0, 2]), []
        for rows in world.device_rows():
            rows.zero_()

        def check(layers: range) -> None:
            reached.append(layers.start)
            for component, buffers in zip(spec.components, world.device.buffers, strict=True):
                for layer, buffer in zip(spec.layers_of(component), buffers, strict=True):
                    assert bool(buffer.view(torch.uint8).any()) == (layer < layers.stop)

        queue.after = check
        assert world.transfer.to_device(pages, pages).error is None
        assert reached == list(range(spec.num_layers))
        for on_device, on_host in zip(world.device_rows(), world.host_rows(), strict=True):
            assert torch.equal(on_device[pages], on_host[pages])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TRANSFERS)
def test_pages_without_bytes_are_copied_at_once_and_settle(
    kind: type[Transfer], layout: str
) -> None:
    with opened(kind, layout, WITHOUT_COMPONENTS, queue=ThreadQueue()) as world:
        assert world.device.buffers == []
        pages = array("i", [4, 0, 2])
        down, up = world.transfer.to_host(pages, pages), world.transfer.to_device(pages, pages)
        for layer in range(WITHOUT_COMPONENTS.num_layers):
            up.wait_layer(layer)
        assert down.wait(10)
        assert up.wait(10)
        assert (down.error, up.error) == (None, None)
        with pytest.raises(IntegrityError):
            world.transfer.to_host(array("i", [5]), array("i", [0]))


def layer_addresses(world: World, layer: int) -> set[int]:
    return {buffers[layer].data_ptr() for buffers in world.device.buffers}


@pytest.mark.parametrize("kind", TRANSFERS)
def test_a_page_id_array_may_be_reused_once_the_ticket_is_out(kind: type[Transfer]) -> None:
    queue = ThreadQueue()
    with opened(kind, "page_first", queue=queue) as world:
        gate = threading.Event()

        def hold(_layers: range) -> None:
            assert gate.wait(10)

        queue.submit([range(1)], hold)
        pages = array("i", [3])
        before = world.host_rows()[0][3].clone()
        ticket = world.transfer.to_host(array("i", [1]), pages)
        pages[0] = 5
        gate.set()
        assert ticket.wait(10)
        assert torch.equal(world.host_rows()[0][3], world.device_rows()[0][1])
        assert not torch.equal(before, world.host_rows()[0][3])


@pytest.mark.parametrize(
    ("device_pages", "host_pages"),
    [([0, 1], [0]), ([5], [0]), ([0], [7]), ([-1], [0]), ([0], [-1])],
)
@pytest.mark.parametrize("kind", TRANSFERS)
def test_pages_that_do_not_exist_are_refused_and_nothing_moves(
    kind: type[Transfer], device_pages: list[int], host_pages: list[int]
) -> None:
    with opened(kind, "layer_first") as world:
        before = [rows.clone() for rows in world.device_rows() + world.host_rows()]
        device, host = array("i", device_pages), array("i", host_pages)
        with pytest.raises(IntegrityError):
            world.transfer.to_host(device, host)
        with pytest.raises(IntegrityError):
            world.transfer.to_device(host, device)
        after = world.device_rows() + world.host_rows()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", TRANSFERS)
def test_engine_owned_slots_with_gaps_between_tokens_are_copied(kind: type[Transfer]) -> None:
    """An engine that keeps k and v of a slot side by side: rows are whole, tokens are not."""
    spec = KVSpec.mha(num_layers=1, num_heads=2, head_dim=4, dtype="float32", fingerprint="f")
    slots = torch.randn(5 * 4 + 3, 2, 2, 4)
    buffers = [[paged(slots[:, 0], 4)], [paged(slots[:, 1], 4)]]
    device = DevicePool.from_buffers(spec, 4, buffers)
    host = HostPool(spec, 4, 5, LAYOUTS["page_first_direct"])
    transfer = kind(device, host, InlineQueue())
    transfer.open()
    assert transfer.to_host(array("i", [2]), array("i", [4])).error is None
    assert torch.equal(host.view(0)[4, 0], slots[8:12, 0])
    assert torch.equal(host.view(1)[4, 0], slots[8:12, 1])
    assert transfer.to_device(array("i", [4]), array("i", [0])).error is None
    assert torch.equal(slots[0:4], slots[8:12])
    transfer.close()


def big_spec(head_dim: int) -> KVSpec:
    """Three pages of it are past the 4 MiB from which the native module stores past the cache."""
    return KVSpec.mha(
        num_layers=1, num_heads=8, head_dim=head_dim, dtype="bfloat16", fingerprint="f"
    )


@pytest.mark.parametrize("head_dim", [128, 100, 3], ids=["whole lines", "not lines", "odd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_copies_are_exact_there_and_back(layout: str, head_dim: int) -> None:
    page_size = 400 * 128 // head_dim
    with opened(TRANSFERS[-1], layout, big_spec(head_dim), page_size, ThreadQueue()) as world:
        down_device, down_host = array("i", [4, 1, 3]), array("i", [0, 6, 5])
        assert world.transfer.to_host(down_device, down_host).wait(20)
        for on_device, on_host in zip(world.device_rows(), world.host_rows(), strict=True):
            assert torch.equal(on_device[down_device], on_host[down_host])
        assert world.transfer.to_device(down_host, array("i", [2, 0, 1])).wait(20)
        for on_device, on_host in zip(world.device_rows(), world.host_rows(), strict=True):
            assert torch.equal(on_device[[2, 0, 1]], on_host[down_host])
