"""Checks a model before it is batched: other sequences in a batch must not change its results."""

from __future__ import annotations

from array import array
from typing import Any

import torch

from hicache_core.engine.runner import Past, Runner
from hicache_core.errors import SpecError
from hicache_core.integrations.model_check import (
    Probe,
    check_same,
    failing_as_spec_error,
    undisturbed,
)
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool

_PAGE_SIZE = 16
_N_SEQUENCES = 8


def check_batches(model: Any, spec: KVSpec, probe: Probe) -> None:
    """Checks that a model computes the same in chunks, and in a batch with other lengths.

    A prompt is computed by a Runner in two chunks; then the last tokens of several of its prefixes,
    in one batch. They share the pages of the prompt, since each writes the row that is there
    already. The pages are freed at the end.

    Args:
        model: a transformers ``…ForCausalLM``, whole.
        spec: of its KV.
        probe: the prompt, and what the model gives for it whole.

    Raises:
        SpecError: the results differ; the message says where.
    """
    text = model.config.get_text_config(decoder=True)
    if "local" in (getattr(text, "attention_layers", None) or ()):
        raise SpecError(
            f"{type(model).__name__} cannot be batched: its local attention counts back from the "
            "end of the longest sequence of a batch"
        )
    ids, whole = probe.tokens, probe.logits
    if not ids:
        return
    pages = array("i", range(-(-len(ids) // _PAGE_SIZE)))
    runner = Runner(model, DevicePool(spec, _PAGE_SIZE, len(pages), model.device))
    n_first = len(ids) * 2 // 3
    lengths = sorted({max(1, len(ids) * n // _N_SEQUENCES) for n in range(1, _N_SEQUENCES + 1)})
    batch = [Past(ids[n - 1], n - 1, pages) for n in lengths]
    with undisturbed(model), failing_as_spec_error(model, "batched", "in chunks or batches"):
        first = runner.prefill(ids[:n_first], 0, pages)
        second = runner.prefill(ids[n_first:], n_first, pages)
        together = runner.decode(batch)
    in_chunks, ends = torch.stack([first, second]), [n - 1 for n in lengths]
    check_same(model, "batched", "in chunks", in_chunks, whole[[n_first - 1, -1]])
    check_same(model, "batched", "beside prompts of other lengths", together, whole[ends])
