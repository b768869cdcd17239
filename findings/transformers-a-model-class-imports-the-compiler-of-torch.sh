#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: importing one model class, here LlamaForCausalLM, imports the compiler of torch
# (torch._dynamo and torch._inductor, with sympy), although nothing is compiled, and accelerate where it is installed.
#
# One would guess that a server which only computes forward passes has torch and a file of transformers in memory. The
# class imports the code that loads weights, that imports the sharded tensors of torch.distributed, and those import the
# compiler: more than a thousand modules, and more than 60 MB of memory that torch alone does not take. Where triton is
# installed its library is loaded, too. So a server's memory beside weights and caches is mostly imports.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install transformers==5.23.0 torch==2.13.0 accelerate==1.15.0 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import re
import sys
from pathlib import Path

import torch


def resident_mb():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


COMPILER = ("torch._dynamo", "torch._inductor", "sympy")
before = {name: name in sys.modules for name in COMPILER}
n_modules, mb = len(sys.modules), resident_mb()
import transformers

lazy_mb = resident_mb() - mb
from transformers import LlamaForCausalLM

after = {name: name in sys.modules for name in COMPILER}
n_more, more_mb = len(sys.modules) - n_modules, resident_mb() - mb - lazy_mb
print(f"with torch {torch.__version__}: {before}")
print(f"with LlamaForCausalLM of transformers {transformers.__version__}: {after}")
print("accelerate:", "accelerate" in sys.modules, "more than 1,000 modules:", n_more > 1000, "more than 60 MB:", more_mb > 60)
assert not any(before.values()), before
assert all(after.values()), after
assert "accelerate" in sys.modules
assert n_more > 1000
assert more_mb > 60
PY
# Seen:
#   with torch 2.13.0+cpu: {'torch._dynamo': False, 'torch._inductor': False, 'sympy': False}
#   with LlamaForCausalLM of transformers 5.23.0: {'torch._dynamo': True, 'torch._inductor': True, 'sympy': True}
#   accelerate: True more than 1,000 modules: True more than 60 MB: True
