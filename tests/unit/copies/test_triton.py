"""The Triton kernel in Triton's interpreter, against the copies by torch on a CPU."""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hicache_core.copies.base import Transfer
from hicache_core.copies.kernel import KernelTransfer
from hicache_core.copies.queues import InlineQueue
from hicache_core.kv.spec import Component, KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from tests.unit.specs_by_layer import BY_LAYER, WITHOUT_COMPONENTS

SPECS = {
    "mha": KVSpec.mha(num_layers=2, num_heads=2, head_dim=64, dtype="bfloat16", fingerprint="f"),
    "mla": KVSpec.mla(
        num_layers=2, kv_lora_rank=512, rope_dim=64, dtype="bfloat16", fingerprint="f"
    ),
    "fp8 with scales": KVSpec.mha(
        num_layers=2,
        num_heads=3,
        head_dim=10,
        dtype="float8_e4m3fn",
        fingerprint="f",
        scale_dtype="float32",
        v_head_dim=5,
    ),
    "a state and a short row": KVSpec(
        (
            Component("recurrent_0", (91, 151), "float32", (0,)),
            Component("conv_0", (5, 3), "float32"),
        ),
        2,
        "f",
        (0, 2),
        (0, 1, 1),
    ),
    **BY_LAYER,
}


@pytest.fixture(scope="module")
def kernel() -> Iterator[ModuleType]:
    """The module, its kernel interpreted: Triton reads the switch when the kernel is defined."""
    pytest.importorskip("triton", reason="Triton is not installed; it comes with CUDA's torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("hicache_core.copies.triton_kernel")


def pools(spec: KVSpec, layout: str) -> tuple[DevicePool, HostPool]:
    """Two pools full of bytes that are the same in every call."""
    device = DevicePool.with_groups(spec, 4, 5, [1] * len(spec.groups))
    host = HostPool(spec, 4, 6, LAYOUTS[layout])
    generator = torch.Generator().manual_seed(1)
    for tensor in all_bytes(device, host):
        tensor.copy_(torch.randint(256, tensor.shape, dtype=torch.uint8, generator=generator))
    return device, host


def all_bytes(device: DevicePool, host: HostPool) -> list[torch.Tensor]:
    on_device = [tensor.view(torch.uint8) for layers in device.buffers for tensor in layers]
    return on_device + [host.rows(c) for c in range(len(host.spec.components))]


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_kernel_moves_the_same_bytes_as_torch(
    kernel: ModuleType, spec: KVSpec, layout: str, down: bool
) -> None:
    results = []
    kinds: list[type[Transfer]] = [kernel.TritonTransfer, KernelTransfer]
    for kind in kinds:
        device, host = pools(spec, layout)
        transfer = kind(device, host, InlineQueue())
        transfer.open()
        device_pages, host_pages = array("i", [4, 0, 2]), array("i", [1, 5, 0])
        if down:
            ticket = transfer.to_host(device_pages, host_pages)
        else:
            ticket = transfer.to_device(host_pages, device_pages)
        assert ticket.error is None
        assert transfer.to_host(array("i"), array("i")).error is None
        transfer.close()
        results.append(all_bytes(device, host))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_kernel_is_not_started_for_pages_without_bytes(kernel: ModuleType) -> None:
    device, host = pools(WITHOUT_COMPONENTS, "page_first")
    transfer = kernel.TritonTransfer(device, host, InlineQueue())
    transfer.open()
    pages = array("i", [4, 0])
    assert transfer.to_host(pages, pages).error is None
    assert transfer.to_device(pages, pages).error is None
    transfer.close()


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_gpus(
    kernel: ModuleType, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton brings its own assembler, so the machine code can be made without a GPU."""
    triton = pytest.importorskip("triton")
    compiler = importlib.import_module("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    pointers = {"plans": "*i64", "device_pages": "*i32", "host_pages": "*i32"}
    constants = {
        "TO_HOST": True,
        "WORD": triton.language.int64,
        "FIELDS": kernel.PLAN_FIELDS,
        "BLOCK": kernel.BLOCK_WORDS,
    }
    source = triton.compiler.ASTSource(
        fn=triton.JITFunction(kernel._copy_rows),
        signature=pointers | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    compiled = triton.compile(source, target=compiler.GPUTarget("cuda", capability, 32))
    assert "st.global.b64" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
