#!/usr/bin/env bash
# transformers 5.23.0: RecurrentGemma keeps the state of its recurrent layers in the modules, not in the cache that it is given.
#
# One would guess that a sequence is all in its cache, as with other models whose DynamicCache has LinearAttentionLayers
# (RecurrentGemma's has them too, and they stay empty): two sequences with a cache each may take turns, and a copy of a cache
# is a place to go on from. Here the next token of one sequence is computed from the state of whatever the model saw
# last, without an error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 transformers==5.23.0 numpy 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import DynamicCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM, logging

logging.set_verbosity_error()
torch.manual_seed(0)
config = RecurrentGemmaConfig(
    vocab_size=97, hidden_size=32, lru_width=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16,
)
model = RecurrentGemmaForCausalLM(config).eval()
for weight in model.parameters():
    if weight.ndim == 2:
        torch.nn.init.normal_(weight, std=0.2)


def see(tokens, start, past):
    """Computes tokens over a cache; the last logits."""
    positions = torch.arange(start, start + len(tokens))[None]
    with torch.no_grad():
        return model(tokens[None], position_ids=positions, past_key_values=past, use_cache=True).logits[0, -1]


def next_logits(others):
    """The logits after one sequence and one more token, with another sequence in between or not."""
    own = DynamicCache(config=config)
    see(torch.arange(32), 0, own)
    if others:
        see(torch.arange(64, 96), 0, DynamicCache(config=config))
    last = see(torch.tensor([7]), 32, own)
    n_states = sum(any(getattr(layer, "is_recurrent_states_initialized", {}).values()) for layer in own.layers)
    return last, n_states


(alone, n_states), (beside, _) = next_logits(False), next_logits(True)
apart = float((beside - alone).abs().max() / alone.abs().max())
print(f"{n_states} layers of the cache hold a state; beside another sequence the next logits differ by {apart:.0e}")
assert n_states == 0 and apart > 1e-3, "the behaviour has changed"
PY
# Seen:
#   0 layers of the cache hold a state; beside another sequence the next logits differ by 2e-01
