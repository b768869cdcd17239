"""Checks a model before it is batched: other sequences in a batch must not change its results."""

from __future__ import annotations

from array import array
from typing import Any

import torch

from hicache_core.engine.runner import HeldUnits, Past, Runner, WindowPages
from hicache_core.errors import SpecError
from hicache_core.integrations.model_check import (
    Probe,
    check_same,
    failing_as_spec_error,
    undisturbed,
)
from hicache_core.kv.spec import GroupKind, KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.radix.results import LACKING

_PAGE_SIZE = 16
_N_SEQUENCES = 8


def check_batches(model: Any, spec: KVSpec, probe: Probe) -> None:
    """Checks that a model computes the same in chunks, and in a batch with other lengths.

    A prompt is computed by a Runner in two chunks, or more if the model has states; then the last
    tokens of several of its prefixes, in one batch. They share the pages of the prompt, since each
    writes the row that is there already. The pages are freed at the end.

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
    if len(ids) < 2:
        return
    lengths = sorted({max(2, len(ids) * n // _N_SEQUENCES) for n in range(1, _N_SEQUENCES + 1)})
    has_state = any(group.kind is GroupKind.STATE for group in spec.groups)
    # A sequence with a state goes on from the one before its last token, so a chunk ends there.
    ends = [n - 1 for n in lengths] if has_state else [len(ids) * 2 // 3]
    ends.append(len(ids))
    pages = array("i", range(-(-len(ids) // _PAGE_SIZE)))
    n_units = [len(pages) if its.kind is GroupKind.WINDOW else len(ends) for its in spec.groups]
    pool = DevicePool.with_groups(spec, _PAGE_SIZE, len(pages), n_units, model.device)
    with undisturbed(model), failing_as_spec_error(model, "batched", "in chunks or batches"):
        runner = Runner(model, pool)
        in_chunks, units = _in_chunks(runner, ids, ends, pages)
        batch = [Past(ids[n - 1], n - 1, pages, units.get(n - 1, units[ends[0]])) for n in lengths]
        together = runner.decode(batch)
    at_ends, at_lengths = whole[[n - 1 for n in ends]], whole[[n - 1 for n in lengths]]
    check_same(model, "batched", "in chunks", in_chunks, at_ends)
    check_same(model, "batched", "beside prompts of other lengths", together, at_lengths)


def _in_chunks(
    runner: Runner, ids: list[int], ends: list[int], pages: array[int]
) -> tuple[torch.Tensor, dict[int, HeldUnits]]:
    """Computes a prompt in chunks; logits at their ends, and what a sequence goes on with there.

    Args:
        runner: of the model.
        ids: the prompt.
        ends: of the chunks, in tokens; each leaves its state in a unit of its own.
        pages: of the prompt, also in each window.
    """
    kinds = [group.kind for group in runner.pool.spec.groups]
    windows = (WindowPages(0, pages),) * kinds.count(GroupKind.WINDOW)
    logits, units, start = [], {}, 0
    for unit, end in enumerate(ends):
        held = HeldUnits(windows, unit - 1 if unit else LACKING, unit)
        logits.append(runner.prefill(ids[start:end], start, pages, held)[-1])
        units[end], start = HeldUnits(windows, unit, unit), end
    return torch.stack(logits), units
