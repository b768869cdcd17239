#!/usr/bin/env bash
# transformers 5.23.0: Zamba 2 and Nemotron-H compute another recurrent state when they decode than when they prefill.
#
# One would guess that a state after n tokens is the same, up to rounding, whether they were computed at once or one at a
# time; with other Mamba 2 layers it is (Bamba, Falcon-H1). These two pass dt_limit=(config.time_step_min, inf) to the scan over
# several tokens, which raises smaller time steps to that limit, and nothing to the update for a single token. So
# a state that an answer has left behind is not that of the same text as a prompt: the next turn of a conversation gets
# other logits over that cache than from nothing. With time_step_min = 0 they are equal.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 transformers==5.23.0 numpy 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import DynamicCache, Zamba2Config, Zamba2ForCausalLM, logging

logging.set_verbosity_error()
TOKENS = torch.randint(97, (1, 64), generator=torch.Generator().manual_seed(1))


def logits(model, parts):
    """The last logits of the tokens, computed in parts of these lengths over one cache."""
    past = DynamicCache(config=model.config)
    for part in TOKENS.split(parts, dim=1):
        with torch.no_grad():
            last = model(part, past_key_values=past, use_cache=True).logits[0, -1]
    return last


apart = {}
for limit in (0.001, 0.0):
    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, n_mamba_heads=4, mamba_d_state=8, chunk_size=16, adapter_rank=4,
        layers_block_type=["linear_attention", "hybrid"], use_mamba_kernels=False,
    )
    model = Zamba2ForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (limit, float("inf"))
    whole = logits(model, [64])
    halves, singly = ((logits(model, parts) - whole).abs().max() / whole.abs().max() for parts in ([32, 32], [32] + [1] * 32))
    apart[limit] = float(singly)
    print(f"time_step_min {limit}: 32 and 32 tokens: logits apart by {halves:.0e}; 32 and 32 times 1: {singly:.0e}")
    assert halves < 1e-4, "the behaviour has changed"
assert apart[0.001] > 1e-3 and apart[0.0] < 1e-4, "the behaviour has changed"
PY
# Seen:
#   time_step_min 0.001: 32 and 32 tokens: logits apart by 3e-06; 32 and 32 times 1: 2e-03
#   time_step_min 0.0: 32 and 32 tokens: logits apart by 8e-07; 32 and 32 times 1: 6e-06
