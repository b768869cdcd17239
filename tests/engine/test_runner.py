"""Runner: the same logits wherever the pages of a sequence are."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hicache_core.engine.pool_cache import Forward, PoolCache, Rows, layer_plans
from hicache_core.engine.runner import HeldUnits, Past, Runner, WindowPages, nothing
from hicache_core.integrations.model_spec import kv_spec_of
from hicache_core.pools.device import DevicePool
from tests.engine.windowed_models import windowed_model

PAGE_SIZE = 4
N_PAGES = 8
IN_ORDER = array("i", [2, 3, 4, 5, 6])
SCATTERED = array("i", [6, 2, 7, 0, 3])


def a_llama() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def a_pool(model: Any) -> DevicePool:
    spec = kv_spec_of(model, "x")
    return DevicePool.with_groups(spec, PAGE_SIZE, N_PAGES, [N_PAGES] * len(spec.groups))


def logits_over(model: Any, pages: array[int], *, n_companions: int = 0) -> torch.Tensor:
    """Logits after a prompt in two chunks, and after each of three tokens more."""
    pool = a_pool(model)
    runner = Runner(model, pool)
    windows = tuple(WindowPages(0, pages) for _ in pool.spec.groups)
    units = HeldUnits(windows)
    tokens = [1 + 7 * n % 60 for n in range(14)]
    runner.prefill(tokens[:9], 0, pages, units)
    logits = [runner.prefill(tokens[9:], 9, pages, units)[-1]]
    for n in range(3):
        past = Past(5 + n, len(tokens) + n, pages, units)
        logits.append(runner.decode([past] * (1 + n_companions))[0])
    return torch.stack(logits)


@pytest.mark.parametrize("make", [a_llama, lambda: windowed_model("gemma3")], ids=["full", "mixed"])
def test_pages_in_order_and_scattered_pages_give_the_same_bits(make: Any) -> None:
    model = make()
    assert torch.equal(logits_over(model, IN_ORDER), logits_over(model, SCATTERED))


def test_a_batch_takes_sequences_whose_pages_are_in_order() -> None:
    model = a_llama()
    alone = logits_over(model, IN_ORDER)
    together = logits_over(model, IN_ORDER, n_companions=1)
    assert torch.allclose(alone, together, atol=1e-5)


def test_rows_that_follow_each_other_are_read_where_they_are() -> None:
    pool = a_pool(a_llama())
    rows = Rows(torch.tensor([13]), slice(8, 14))
    cache = PoolCache(layer_plans(pool, [0, 0]), Forward((rows,), 5, 1), nothing, nothing)
    new = torch.ones(1, 2, 1, 8)
    keys, values = cache.update(new, 2 * new, 1)
    for found, component, value in ((keys, 0, 1.0), (values, 1, 2.0)):
        own = pool.buffers[component][1].flatten(0, 1)[8:14]
        assert found.shape == (1, 2, 6, 8)
        assert found.data_ptr() == own.data_ptr()
        assert torch.equal(own[-1], torch.full((2, 8), value))
