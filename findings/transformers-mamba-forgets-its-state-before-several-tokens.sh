#!/usr/bin/env bash
# transformers 5.23.0: a Mamba 1 layer (mamba, falcon_mamba, jamba, zamba) ignores the recurrent state of the cache that it
# is given when more than one token follows.
#
# One would guess that a prompt may be computed in two parts over one DynamicCache, as with Mamba 2: get_recurrent_state is
# called either way. But the mixer uses that state for a single token only (`if recurrent_state is not None and
# seq_len == 1`); its scan over several tokens begins at zero, without an error, and its final state overwrites the
# right one. The convolution does continue, so answers look plausible. The rest of a prompt gives the same logits only if
# it is fed one token at a time.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 transformers==5.23.0 numpy 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import DynamicCache, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, logging

logging.set_verbosity_error()
TOKENS = torch.arange(64)[None] % 97


def logits(model, parts):
    """The last logits of the tokens, computed in parts of these lengths over one cache."""
    past = DynamicCache(config=model.config)
    for part in TOKENS.split(parts, dim=1):
        with torch.no_grad():
            last = model(part, cache_params=past, use_cache=True).logits[0, -1]
    return last


def apart(model, parts):
    whole = logits(model, [64])
    return float((logits(model, parts) - whole).abs().max() / whole.abs().max())


small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
torch.manual_seed(0)
one = MambaForCausalLM(MambaConfig(**small)).eval()
two = Mamba2ForCausalLM(Mamba2Config(**small, num_heads=4, head_dim=16, n_groups=1, chunk_size=16)).eval()
for name, model in (("Mamba 1", one), ("Mamba 2", two)):
    for weight in model.parameters():
        if weight.ndim == 2 and weight.shape[1] > 8:
            torch.nn.init.normal_(weight, std=0.3)
    halves, singly = apart(model, [32, 32]), apart(model, [32] + [1] * 32)
    print(f"{name}: 32 and 32 tokens: logits apart by {halves:.0e}; 32 and 32 times 1: {singly:.0e}")
    assert singly < 1e-4 and (halves > 1e-3) == (name == "Mamba 1"), "the behaviour has changed"
PY
# Seen:
#   Mamba 1: 32 and 32 tokens: logits apart by 1e-01; 32 and 32 times 1: 4e-07
#   Mamba 2: 32 and 32 tokens: logits apart by 2e-07; 32 and 32 times 1: 4e-07
