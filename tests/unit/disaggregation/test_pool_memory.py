"""The device pool of an engine as page memory: the same bytes, no copy."""

from __future__ import annotations

import pytest
import torch

from hicache_core.disaggregation.pool_memory import memory_of_pool
from hicache_core.errors import SpecError
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool
from tests.unit.specs_by_layer import BY_LAYER, WITHOUT_COMPONENTS

PAGE_SIZE = 4


@pytest.mark.parametrize("spec", BY_LAYER.values(), ids=BY_LAYER)
def test_what_a_layer_has_is_in_its_segments(spec: KVSpec) -> None:
    pool = DevicePool(spec, PAGE_SIZE, 3)
    memory = memory_of_pool(pool)
    for layer in range(spec.num_layers):
        found = memory.segments(layer, [2, 0], 1, 6, memory.heads)
        for segment in found:
            segment[:] = bytes([layer + 1]) * segment.nbytes
        assert sum(segment.nbytes for segment in found) == memory.nbytes(5, memory.heads, layer)
    for component, buffers in zip(spec.components, pool.buffers, strict=True):
        for layer, buffer in zip(spec.layers_of(component), buffers, strict=True):
            rows = buffer.view(3, PAGE_SIZE, -1).view(torch.uint8)
            expected = torch.zeros_like(rows)
            expected[2, 1:] = expected[0, :2] = layer + 1
            assert torch.equal(rows, expected)


def test_pages_without_bytes_have_no_segments() -> None:
    memory = memory_of_pool(DevicePool.with_groups(WITHOUT_COMPONENTS, PAGE_SIZE, 3, [1]))
    assert memory.segments(0, [2, 0], 1, 6, memory.heads) == []
    assert memory.nbytes(5, memory.heads) == 0


def test_pages_with_gaps_between_them_are_refused() -> None:
    spec = KVSpec.mla(num_layers=1, kv_lora_rank=3, rope_dim=1, dtype="int8", fingerprint="f")
    wide = torch.zeros(3, PAGE_SIZE, 8, dtype=torch.int8)
    pool = DevicePool.from_buffers(spec, PAGE_SIZE, [[wide[..., :4]]])
    with pytest.raises(SpecError, match="gaps between them"):
        memory_of_pool(pool)
