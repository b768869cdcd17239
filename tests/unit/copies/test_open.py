"""Which transfer is opened for an io backend and a device."""

from __future__ import annotations

import sys
from array import array

import pytest
import torch

from hicache_core.copies import native
from hicache_core.copies.direct import DirectTransfer
from hicache_core.copies.kernel import KernelTransfer
from hicache_core.copies.open import open_transfer
from hicache_core.copies.queues import InlineQueue
from hicache_core.errors import SpecError, UseAfterClose
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS

SPEC = KVSpec.mha(num_layers=3, num_heads=2, head_dim=8, dtype="bfloat16", fingerprint="f")
TWINS = {"direct": DirectTransfer, "kernel": KernelTransfer}


def pools(device: str = "cpu", host_page_size: int = 4) -> tuple[DevicePool, HostPool]:
    host = HostPool(SPEC, host_page_size, 2, LAYOUTS["page_first"])
    return DevicePool(SPEC, 4, 2, device), host


@pytest.mark.parametrize("io_backend", TWINS)
def test_a_cpu_without_the_native_module_gets_its_twin(
    io_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "IS_BUILT", False)
    transfer = open_transfer(io_backend, *pools())
    assert type(transfer) is TWINS[io_backend]
    transfer.close()


@pytest.mark.skipif(not native.IS_BUILT, reason="the native module is not built, or switched off")
@pytest.mark.parametrize("io_backend", TWINS)
def test_a_cpu_with_the_native_module_gets_it_for_both_io_backends(io_backend: str) -> None:
    transfer = open_transfer(io_backend, *pools())
    assert type(transfer) is native.NativeTransfer
    transfer.close()


def test_the_native_module_is_refused_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="it is on meta"):
        native.NativeTransfer(*pools("meta"), InlineQueue())
    monkeypatch.setattr(native, "IS_BUILT", False)
    with pytest.raises(SpecError, match="built: False"):
        native.NativeTransfer(*pools(), InlineQueue())


def test_another_device_gets_plain_copies_for_direct_and_must_pin_for_kernel() -> None:
    """torch's device ``meta`` stands in for a GPU."""
    transfer = open_transfer("direct", *pools("meta"), InlineQueue())
    assert type(transfer) is DirectTransfer
    transfer.close()
    with pytest.raises(SpecError, match="pin=True"):
        open_transfer("kernel", *pools("meta"), InlineQueue())


def test_kernel_without_triton_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's device ``meta`` stands in for a GPU."""
    device, host = pools("meta")
    host.pinned = True
    monkeypatch.setitem(sys.modules, "hicache_core.copies.triton_kernel", None)
    with pytest.raises(SpecError, match=r"needs Triton.*'direct'"):
        open_transfer("kernel", device, host, InlineQueue())
    host.pinned = False


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_copies_are_asynchronous_only_where_both_sides_are_contiguous(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere torch copies to memory of its own first, and on from there by the CPU, at once."""
    asked = []
    copy = torch.Tensor.copy_

    def spy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        asked.append(non_blocking)
        return copy(target, source)

    host = HostPool(SPEC, 4, 2, LAYOUTS[layout])
    transfer = DirectTransfer(DevicePool(SPEC, 4, 2), host, InlineQueue())
    transfer.open()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", spy)
        transfer.to_host(array("i", [0]), array("i", [1]))
        transfer.to_device(array("i", [1]), array("i", [0]))
    assert len(asked) == 2 * 2 * SPEC.num_layers
    assert set(asked) == {layout != "page_first"}
    transfer.close()


def test_pools_of_different_pages_are_refused() -> None:
    with pytest.raises(SpecError, match="page"):
        open_transfer("direct", *pools(host_page_size=8))


def test_an_unknown_io_backend_is_named_with_those_that_exist() -> None:
    with pytest.raises(SpecError, match="'dircet'; the io backends are: direct, kernel"):
        open_transfer("dircet", *pools())


@pytest.mark.parametrize("io_backend", TWINS)
def test_after_close_a_transfer_takes_nothing(io_backend: str) -> None:
    transfer = open_transfer(io_backend, *pools())
    ticket = transfer.to_host(array("i", [0]), array("i", [1]))
    transfer.close()
    transfer.close()
    assert ticket.done()
    with pytest.raises(UseAfterClose):
        transfer.to_host(array("i", [0]), array("i", [1]))
