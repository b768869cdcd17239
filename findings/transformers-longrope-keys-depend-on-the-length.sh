#!/usr/bin/env bash
# transformers 5.23.0, rope type "longrope": the cached keys of a token depend on how long the forward was that
# computed them, not on the token's position alone.
#
# One would guess that the key of position 3 is the same whether a prompt of 16 or of 80 tokens was computed, as with
# every other rope type but "dynamic": that is what makes a prefix reusable. With longrope the factors for all
# positions of a forward are chosen by whether its last position is beyond original_max_position_embeddings (64 here):
# within the limit equal, beyond it other keys for the same leading tokens. A prefix cache must keep the two kinds apart.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 transformers==5.23.0 numpy 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


def first_keys(rope, n_tokens):
    """Keys of the first 16 tokens in layer 0, computed in one forward of n_tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, rope_parameters=rope,
    )
    model = LlamaForCausalLM(config).eval()
    past = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.arange(n_tokens)[None] % 97, past_key_values=past)
    return past.layers[0].keys[0, :, :16]


def apart(rope, short, long):
    return float((first_keys(rope, short) - first_keys(rope, long)).abs().max())


plain = {"rope_type": "default", "rope_theta": 10000.0}
longrope = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0,
}
seen = {
    "default, 16 against 80": apart(plain, 16, 80),
    "longrope, 16 against 60": apart(longrope, 16, 60),
    "longrope, 16 against 80": apart(longrope, 16, 80),
    "longrope, 70 against 80": apart(longrope, 70, 80),
}
for name, value in seen.items():
    print(f"{name}: keys of the first 16 tokens differ by at most {value:.2g}")
values = list(seen.values())
assert values[0] < 1e-5 and values[1] < 1e-5 and values[2] > 1e-2 and values[3] < 1e-5, "the behaviour has changed"
PY
# Seen:
#   default, 16 against 80: keys of the first 16 tokens differ by at most 0
#   longrope, 16 against 60: keys of the first 16 tokens differ by at most 0
#   longrope, 16 against 80: keys of the first 16 tokens differ by at most 0.53
#   longrope, 70 against 80: keys of the first 16 tokens differ by at most 0
