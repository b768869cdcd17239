"""PagedCache over a device pool: what a model computes is what it computes without it."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hicache_core.errors import ConfigError, SpecError
from hicache_core.integrations.paged_cache import PagedCache
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool

from .tiny_models import prompt_of

PAGE_SIZE = 4
N_PAGES = 32


def pool_for(model: Any, dtype: str = "float32") -> DevicePool:
    spec = KVSpec.from_model_config(model.config, fingerprint="tiny", dtype=dtype)
    return DevicePool(spec, PAGE_SIZE, N_PAGES)


def cached_prefix(
    model: Any, pool: DevicePool, tokens: list[int], *, in_order: bool = False
) -> array[int]:
    """Computes ``tokens`` into pages that are neither adjacent nor ascending, or are both."""
    n_pages = len(tokens) // PAGE_SIZE
    taken = pool.allocator.allocate(2 * n_pages)
    pages = taken[n_pages:] if in_order else taken[::-2]
    past = PagedCache(pool, array("i"))
    forward(model, tokens, past)
    past.write_pages(0, pages)
    return pages


def forward(model: Any, tokens: list[int], past: Any = None) -> torch.Tensor:
    """Logits (n_tokens, vocabulary)."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), past_key_values=past).logits[0]


def generate(model: Any, tokens: list[int], past: Any, **arguments: Any) -> list[int]:
    ids = torch.tensor([tokens])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=past,
        max_new_tokens=12,
        do_sample=False,
        **arguments,
    )
    return output[0].tolist()


def test_an_empty_cache_gives_the_logits_of_no_cache(model: Any) -> None:
    tokens = prompt_of(23)
    past = PagedCache(pool_for(model), array("i"))
    torch.testing.assert_close(forward(model, tokens, past), forward(model, tokens))
    assert past.get_seq_length() == 23


@pytest.mark.parametrize("in_order", [False, True])
def test_a_prefix_in_pages_gives_the_bits_of_the_same_split_in_memory(
    model: Any, in_order: bool
) -> None:
    tokens, n_prefix = prompt_of(27), 20
    pool = pool_for(model)
    pages = cached_prefix(model, pool, tokens[:n_prefix], in_order=in_order)
    plain = DynamicCache(config=model.config)
    forward(model, tokens[:n_prefix], plain)
    paged = PagedCache(pool, pages)
    assert paged.get_seq_length() == n_prefix
    found = forward(model, tokens[n_prefix:], paged)
    assert torch.equal(found, forward(model, tokens[n_prefix:], plain))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.25), (torch.float16, 0.03)]
)
def test_a_prefix_in_pages_gives_the_logits_of_no_cache_within_rounding(
    model: Any, dtype: torch.dtype, tolerance: float
) -> None:
    tokens, n_prefix = prompt_of(27), 20
    model = model.to(dtype)
    pool = pool_for(model, str(dtype).removeprefix("torch."))
    pages = cached_prefix(model, pool, tokens[:n_prefix])
    found = forward(model, tokens[n_prefix:], PagedCache(pool, pages)).float()
    whole = forward(model, tokens)[n_prefix:].float()
    error = float((found - whole).abs().max() / whole.abs().max())
    assert error < tolerance, error


def test_generate_over_a_prefix_gives_the_tokens_of_no_cache(model: Any) -> None:
    tokens, n_prefix = prompt_of(27), 20
    pool = pool_for(model)
    pages = cached_prefix(model, pool, tokens[:n_prefix])
    past = PagedCache(pool, pages)
    assert generate(model, tokens, past) == generate(model, tokens, None)
    assert past.get_seq_length() == len(tokens) + 12 - 1


def test_growth_beyond_the_first_capacity_changes_no_token(model: Any) -> None:
    """The rows start with room for 64 more tokens; 12 turns of 12 tokens outgrow it twice."""
    past, plain = PagedCache(pool_for(model), array("i")), DynamicCache(config=model.config)
    tokens = prompt_of(5)
    for _ in range(12):
        grown = generate(model, tokens, past)
        assert grown == generate(model, tokens, plain)
        tokens = grown
    for layer, other in zip(past.layers, plain.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)


def test_one_wrong_page_is_seen_in_the_logits(model: Any) -> None:
    """The tests above can fail: a single page of other tokens, or of zeros, shows.

    Two pages of one prefix in the wrong order would not: keys carry their position, and attention
    over the past does not ask for their order. ``test_pages_written_back…`` holds the order.
    """
    tokens, n_prefix = prompt_of(27), 20
    pool = pool_for(model)
    pages = cached_prefix(model, pool, tokens[:n_prefix])
    right = forward(model, tokens[n_prefix:], PagedCache(pool, pages))
    other = cached_prefix(model, pool, prompt_of(4, seed=9))
    for wrong_page in (other, pool.allocator.allocate(1)):
        wrong = array("i", [*pages[:2], *wrong_page, *pages[3:]])
        found = forward(model, tokens[n_prefix:], PagedCache(pool, wrong))
        assert (found - right).abs().max() > 0.1
        assert (found.argmax(-1) != right.argmax(-1)).any()


def test_each_layer_waits_for_itself_and_only_when_it_is_reached(model: Any) -> None:
    """When layer i is waited for, no layer behind it has been asked for."""
    pool = pool_for(model)
    pages = cached_prefix(model, pool, prompt_of(8))
    waited: list[int] = []
    past = PagedCache(pool, pages, waited.append)
    forward(model, [1, 2], past)
    assert waited == [0, 1, 2]
    forward(model, [3], past)
    assert waited == [0, 1, 2], "a prefix is read once"


def test_rows_that_arrive_at_the_last_moment_are_seen(model: Any) -> None:
    """Layer i's pages are filled by wait_layer(i) itself: reading earlier would read zeros."""
    tokens, n_prefix = prompt_of(27), 20
    source = pool_for(model)
    pages = cached_prefix(model, source, tokens[:n_prefix])
    target = DevicePool(source.spec, PAGE_SIZE, N_PAGES)

    def arrive(layer: int) -> None:
        for there, here in zip(target.buffers, source.buffers, strict=True):
            there[layer].copy_(here[layer])

    found = forward(model, tokens[n_prefix:], PagedCache(target, pages, arrive))
    assert torch.equal(found, forward(model, tokens[n_prefix:], PagedCache(source, pages)))


def test_pages_written_back_hold_the_rows_of_the_sequence(model: Any) -> None:
    pool = pool_for(model)
    prefix = cached_prefix(model, pool, prompt_of(8))
    past = PagedCache(pool, prefix)
    forward(model, prompt_of(10, seed=3), past)  # 18 tokens: two more whole pages, half a page
    new = pool.allocator.allocate(2)
    past.write_pages(past.n_shared_pages, new)
    for buffers, name in zip(pool.buffers, ("keys", "values"), strict=True):
        for layer, buffer in zip(past.layers, buffers, strict=True):
            rows = buffer[torch.tensor([*prefix, *new])].flatten(0, 1)
            assert torch.equal(rows, getattr(layer, name)[0, :, :16].transpose(0, 1))


def test_pages_that_the_sequence_does_not_fill_cannot_be_written(model: Any) -> None:
    pool = pool_for(model)
    past = PagedCache(pool, array("i"))
    forward(model, prompt_of(7), past)
    with pytest.raises(SpecError, match="holds 7 tokens; 8 are to be stored"):
        past.write_pages(0, pool.allocator.allocate(2))


@pytest.mark.parametrize("n_removed", [1, 9, 20])
def test_crop_takes_back_tokens_and_parts_of_the_prefix(model: Any, n_removed: int) -> None:
    pool = pool_for(model)
    tokens = prompt_of(22)
    pages = cached_prefix(model, pool, tokens[:16])
    past = PagedCache(pool, pages)
    forward(model, tokens[16:], past)
    past.crop(-n_removed)
    n_kept = 22 - n_removed
    assert past.get_seq_length() == n_kept
    assert past.n_shared_pages == min(16, n_kept) // PAGE_SIZE
    found = forward(model, tokens[n_kept:], past)
    torch.testing.assert_close(found, forward(model, tokens)[n_kept:], rtol=1e-3, atol=1e-3)


def test_crop_before_the_first_forward_shortens_the_prefix(model: Any) -> None:
    pool = pool_for(model)
    tokens = prompt_of(16)
    past = PagedCache(pool, cached_prefix(model, pool, tokens))
    past.crop(-6)
    found = forward(model, tokens[10:], past)
    torch.testing.assert_close(found, forward(model, tokens)[10:], rtol=1e-3, atol=1e-3)


def test_reset_forgets_the_prefix_too(model: Any) -> None:
    pool = pool_for(model)
    past = PagedCache(pool, cached_prefix(model, pool, prompt_of(16)))
    forward(model, [1, 2, 3], past)
    past.reset()
    assert past.get_seq_length() == 0
    assert past.n_shared_pages == 0
    tokens = prompt_of(9, seed=4)
    torch.testing.assert_close(forward(model, tokens, past), forward(model, tokens))


def test_assisted_decoding_rolls_back_without_a_trace(model: Any) -> None:
    """It crops the candidates that were rejected."""
    tokens = prompt_of(6) * 4
    past = PagedCache(pool_for(model), array("i"))
    found = generate(model, tokens, past, prompt_lookup_num_tokens=3)
    assert found == generate(model, tokens, None)


def test_assisted_decoding_over_a_prefix_is_refused(model: Any) -> None:
    """transformers would compute the prefix twice, and other tokens would come out."""
    tokens = prompt_of(6) * 4
    pool = pool_for(model)
    past = PagedCache(pool, cached_prefix(model, pool, tokens[:20]))
    with pytest.raises(ConfigError, match="cannot start over 20 cached tokens"):
        generate(model, tokens, past, prompt_lookup_num_tokens=3)


def test_more_than_one_sequence_is_refused(model: Any) -> None:
    past = PagedCache(pool_for(model), array("i"))
    with pytest.raises(SpecError, match=r"one sequence, found a batch of 2"):
        model(torch.tensor([[1, 2], [3, 4]]), past_key_values=past)
    with pytest.raises(SpecError, match=r"one sequence, found a batch of 3"):
        generate(model, [1, 2], PagedCache(pool_for(model), array("i")), num_beams=3)


def test_a_pool_of_another_shape_or_dtype_is_refused(model: Any) -> None:
    with pytest.raises(SpecError, match=r"layer 0: the model's k has .* torch\.float32; the pool"):
        forward(model, [1, 2], PagedCache(pool_for(model, "bfloat16"), array("i")))
    latent = KVSpec.mla(
        num_layers=3, kv_lora_rank=16, rope_dim=8, dtype="float32", fingerprint="tiny"
    )
    with pytest.raises(SpecError, match=r"the model's latent has the shape and dtype \(2, "):
        forward(model, [1, 2], PagedCache(DevicePool(latent, PAGE_SIZE, 4), array("i")))
