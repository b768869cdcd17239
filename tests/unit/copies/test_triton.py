"""The Triton kernel in Triton's interpreter, against the copies by torch on a CPU."""

from __future__ import annotations

import importlib
import mmap
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hicache_core.copies.base import Transfer
from hicache_core.copies.kernel import KernelTransfer
from hicache_core.copies.queues import InlineQueue
from hicache_core.copies.rows import WORDS
from hicache_core.errors import SpecError
from hicache_core.kv.spec import Component, KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from hicache_core.pools.mapping import map_memory
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


def test_rows_beyond_two_gib_are_found(kernel: ModuleType) -> None:
    """The memory is mapped and, but for two pages, never touched, so that it takes no room."""
    spec = KVSpec((Component("k", (8,), "int8"),), 1, "f", (0, 1), (0, 1, 1))
    mapped = mmap.mmap(-1, (1 << 32) + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    far = torch.frombuffer(mapped, dtype=torch.int8).as_strided((3, 2, 8), (1 << 31, 8, 1))
    device = DevicePool.from_buffers(spec, 2, [[far]])
    host = HostPool(spec, 2, 1, LAYOUTS["page_first"])
    transfer = kernel.TritonTransfer(device, host, InlineQueue())
    transfer.open()
    far[2].copy_(torch.arange(16).view(2, 8))
    assert transfer.to_host(array("i", [2]), array("i", [0])).error is None
    assert host.view(0).flatten().tolist() == list(range(16))
    assert transfer.to_device(array("i", [0]), array("i", [1])).error is None
    assert torch.equal(far[1], far[2])
    transfer.close()


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
def test_words_are_no_wider_than_the_address_of_an_engines_memory_allows(
    kernel: ModuleType, offset: int
) -> None:
    """A GPU fails for good when it reads eight bytes that do not start at a multiple of eight."""
    spec = KVSpec((Component("k", (8,), "uint8"),), 1, "f", (0, 1), (0, 1, 1))
    memory = torch.frombuffer(map_memory(4096)[offset:], dtype=torch.uint8)
    device = DevicePool.from_buffers(spec, 1, [[memory[:16].view(2, 1, 8)]])
    host = HostPool(spec, 1, 1, LAYOUTS["page_first"])
    transfer = kernel.TritonTransfer(device, host, InlineQueue())
    assert {rows.dtype for rows in transfer._rows[0][0]} == {WORDS[offset or 8]}


def test_a_kernel_that_cannot_be_compiled_is_an_error_when_the_transfer_is_made(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoCompiler:
        def __getitem__(self, grid: tuple[int, ...]) -> NoCompiler:
            return self

        def __call__(self, *args: object, **constants: object) -> None:
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernel, "copy_rows", NoCompiler())
    with pytest.raises(SpecError, match=r"Failed to find C compiler.*'direct'"):
        kernel.TritonTransfer(*pools(SPECS["mha"], "page_first"), InlineQueue())


@pytest.mark.parametrize("to_host", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_gpus(
    kernel: ModuleType,
    capability: int,
    to_host: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton brings its own assembler, so the machine code can be made without a GPU."""
    triton = pytest.importorskip("triton")
    compiler = importlib.import_module("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    pointers = {"plans": "*i64", "device_pages": "*i32", "host_pages": "*i32"}
    counts = {"n_pairs": "i32", "n_plans": "i32"}
    constants = {
        "TO_HOST": to_host,
        "TOKENS": 64,
        "WORD": triton.language.int64,
        "FIELDS": kernel.PLAN_FIELDS,
        "BLOCK": kernel.BLOCK_WORDS,
    }
    source = triton.compiler.ASTSource(
        fn=triton.JITFunction(kernel._copy_rows),
        signature=pointers | counts | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    compiled = triton.compile(source, target=compiler.GPUTarget("cuda", capability, 32))
    assert "st.global.b64" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
