"""Host and device pools: memory, pages, close."""

from __future__ import annotations

import pytest
import torch

from hicache_core.errors import IntegrityError, NotEnoughMemory, SpecError, UseAfterClose
from hicache_core.kv.spec import Component, KVSpec
from hicache_core.pools.device import DevicePool, paged
from hicache_core.pools.host import HEADER_NBYTES, HostPool
from hicache_core.pools.layout import LAYOUTS
from hicache_core.pools.mapping import map_memory
from tests.unit.specs_by_layer import BY_LAYER

SPEC = KVSpec.mha(num_layers=2, num_heads=2, head_dim=4, dtype="bfloat16", fingerprint="f")
HUGE = KVSpec.mha(num_layers=999, num_heads=999, head_dim=999, dtype="float32", fingerprint="f")
QUANTIZED = KVSpec.mha(
    num_layers=2,
    num_heads=2,
    head_dim=8,
    dtype="float8_e4m3fn",
    fingerprint="f",
    scale_dtype="float32",
    v_head_dim=4,
)


def host_pool(layout: str = "page_first", **kwargs: object) -> HostPool:
    return HostPool(SPEC, 4, 5, LAYOUTS[layout], **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_segments_are_writable_bytes_of_the_pool_and_of_one_page_only(layout: str) -> None:
    pool = host_pool(layout)
    for page in range(5):
        for segment in pool.pages([page])[0]:
            assert (segment.format, segment.contiguous, segment.readonly) == ("B", True, False)
            segment[:] = bytes([page + 1]) * segment.nbytes
    for page, (header, *payload) in enumerate(pool.pages(range(5))):
        assert bytes(header) == bytes([page + 1]) * HEADER_NBYTES
        assert b"".join(payload) == bytes([page + 1]) * SPEC.page_nbytes(4)
        assert all(bool((pool.rows(c)[page] == page + 1).all()) for c in range(2))


def test_pages_are_made_when_they_are_looked_at_and_can_be_sliced() -> None:
    pool = host_pool()
    ids = pool.allocator.allocate(4)
    pages = pool.pages(ids)
    assert len(pages) == 4
    assert len(pages[1:3]) == 2
    assert pages[1:3][0][1].obj is pages[1][1].obj
    pages[-1][1][:1] = b"z"
    assert pool.pages([3])[0][1][0] == ord("z")
    with pytest.raises(IndexError):
        pages[4]


def test_pages_are_those_named_at_the_time() -> None:
    pool = host_pool()
    ids = pool.allocator.allocate(2)
    pages = pool.pages(ids)
    ids[0] = 4
    pages[0][0][:1] = b"h"
    assert pool.pages([0])[0][0][0] == ord("h")


@pytest.mark.parametrize("ids", [[5], [-1], [0, 2, 9]])
def test_a_page_that_does_not_exist_has_no_segments(ids: list[int]) -> None:
    with pytest.raises(IntegrityError, match="in a pool of 5 pages"):
        host_pool().pages(ids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_segments_lie_in_the_buffers_that_are_registered(layout: str) -> None:
    pool = host_pool(layout)
    (buffer,) = pool.buffers
    assert buffer.nbytes == pool.nbytes
    start = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    for page in pool.pages(range(5)):
        assert sum(segment.nbytes for segment in page) == pool.object_nbytes
        for segment in page:
            address = torch.frombuffer(segment, dtype=torch.uint8).data_ptr()
            assert start <= address
            assert address + segment.nbytes <= start + buffer.nbytes


def test_after_close_a_host_pool_gives_nothing() -> None:
    pool = host_pool()
    held = pool.pages([0])[0][1]
    pool.close()
    pool.close()
    held[:] = bytes(held.nbytes)  # a view that is still held keeps its memory
    for call in (lambda: pool.pages([0]), lambda: pool.rows(0), lambda: pool.view(0)):
        with pytest.raises(UseAfterClose):
            call()
    with pytest.raises(UseAfterClose):
        _ = pool.buffers


def test_a_component_that_is_not_aligned_has_rows_but_no_view() -> None:
    components = (Component("flag", (3,), "int8"), Component("k", (2,), "float32"))
    spec = KVSpec(components, 1, "f", (0, 1), (0, 1, 1))
    pool = HostPool(spec, 1, 2, LAYOUTS["page_first"])
    assert pool.rows(1).shape == (2, 1, 1, 8)
    with pytest.raises(SpecError, match=r"'k'.*not aligned in layout page_first"):
        pool.view(1)
    assert HostPool(spec, 1, 2, LAYOUTS["layer_first"]).view(1).shape == (2, 1, 1, 2)


def test_more_than_the_machine_has_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(NotEnoughMemory, match="lower hicache_size or hicache_ratio"):
        HostPool(HUGE, 64, 10**6, LAYOUTS["page_first"])
    with pytest.raises(NotEnoughMemory, match="device pool"):
        DevicePool(HUGE, 64, 10**6)


@pytest.mark.parametrize(("page_size", "n_pages"), [(0, 5), (-1, 5), (4, 0)])
def test_pools_need_pages_of_tokens(page_size: int, n_pages: int) -> None:
    with pytest.raises(SpecError):
        HostPool(SPEC, page_size, n_pages, LAYOUTS["page_first"])
    with pytest.raises(SpecError):
        DevicePool(SPEC, page_size, n_pages)


def resident_nbytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_mapped_memory_is_present_and_its_progress_is_told() -> None:
    nbytes = 64 << 20
    told: list[tuple[int, int]] = []
    before = resident_nbytes()
    memory = map_memory(nbytes, lambda done, total: told.append((done, total)))
    assert resident_nbytes() - before > nbytes * 0.9
    assert told == [(nbytes, nbytes)]
    assert memory.nbytes == nbytes
    assert not any(memory[:: 1 << 16])


class EmulatedCudart:
    """Notes what would be registered with CUDA; there is no GPU here."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 3
        self.registered[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return self.error


def test_a_pinned_pool_registers_all_its_memory_until_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudart = EmulatedCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    pool = host_pool(pin=True)
    address = torch.frombuffer(pool.buffers[0], dtype=torch.uint8).data_ptr()
    assert cudart.registered == {address: pool.nbytes}
    pool.close()
    assert cudart.registered == {}


def test_memory_that_cuda_refuses_to_pin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: EmulatedCudart(error=2))
    with pytest.raises(NotEnoughMemory, match=r"cudaHostRegister .* CUDA error 2"):
        host_pool(pin=True)


@pytest.mark.parametrize("spec", [QUANTIZED, *BY_LAYER.values()], ids=["quantized", *BY_LAYER])
def test_device_buffers_are_zero_and_do_not_overlap(spec: KVSpec) -> None:
    pool = DevicePool(spec, 4, 5)
    assert [len(b) for b in pool.buffers] == [len(spec.layers_of(c)) for c in spec.components]
    buffers = [buffer for layers in pool.buffers for buffer in layers]
    for component, layers in zip(spec.components, pool.buffers, strict=True):
        for buffer in layers:
            assert buffer.shape == (5, 4, *component.shape)
            assert str(buffer.dtype) == f"torch.{component.dtype}"
            assert not buffer.view(torch.uint8).any()
    for i, buffer in enumerate(buffers):
        buffer.view(torch.uint8).fill_(i + 1)
    for i, buffer in enumerate(buffers):
        assert bool((buffer.view(torch.uint8) == i + 1).all())


def test_a_device_may_be_named_as_torch_allows() -> None:
    """As "cuda" names the current GPU, whose tensors say "cuda:0"."""
    pool = DevicePool(SPEC, 4, 5, "cpu:0")
    assert pool.device == pool.buffers[0][0].device


def test_tensors_are_needed_for_the_layers_that_have_the_component() -> None:
    spec = BY_LAYER["latent and indexer keys"]
    latent = [torch.zeros(5, 4, 20, dtype=torch.bfloat16) for _ in range(3)]
    keys = [torch.zeros(5, 4, 7, dtype=torch.int8) for _ in range(3)]
    assert DevicePool.from_buffers(spec, 4, [latent, keys[:2]]).n_pages == 5
    with pytest.raises(SpecError, match=r"2 components of \[3, 2\] layers, found \[3, 3\]"):
        DevicePool.from_buffers(spec, 4, [latent, keys])
    with pytest.raises(SpecError, match="indexer_k of layer 2: need shape"):
        DevicePool.from_buffers(spec, 4, [latent, [keys[0], latent[0]]])


def engine_tensors(n_slots: int = 22) -> list[list[torch.Tensor]]:
    return [[torch.zeros(n_slots, 2, 4, dtype=torch.bfloat16) for _ in "ab"] for _ in "kv"]


def test_tensors_of_an_engine_are_used_in_place() -> None:
    tensors = engine_tensors()
    pool = DevicePool.from_buffers(SPEC, 4, [[paged(t, 4) for t in layers] for layers in tensors])
    assert (pool.n_pages, pool.allocator.n_free) == (5, 5)
    pool.buffers[1][0][2, 3] = 7
    assert tensors[1][0][2 * 4 + 3].eq(7).all()


def broken(change: str) -> list[list[torch.Tensor]]:
    buffers = [[paged(t, 4) for t in layers] for layers in engine_tensors()]
    if change == "layer missing":
        buffers[1].pop()
    elif change == "dtype":
        buffers[1][0] = buffers[1][0].float()
    elif change == "shape":
        buffers[1][0] = buffers[1][0][:, :, :1]
    elif change == "gap":
        buffers[1][0] = torch.zeros(5, 4, 2, 8, dtype=torch.bfloat16)[..., ::2]
    elif change == "nothing":
        buffers = []
    return buffers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("layer missing", r"found \[2, 1\]"),
        ("dtype", "v of layer 0.*float32"),
        ("shape", r"v of layer 0.*\(5, 4, 1, 4\)"),
        ("gap", "v of layer 0: a row has gaps"),
        ("nothing", "none given"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        DevicePool.from_buffers(SPEC, 4, broken(change))
