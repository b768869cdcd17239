"""Runs the rules of a module beside it, by vLLM's own Python: vllm_rules.py MODULE

A rule is a function whose name starts with ``rule_``; its one argument is an empty folder. Prints a
JSON object: for each rule its traceback, empty if the rule holds.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path


def main(module_name: str) -> None:
    """Runs every rule of the module; what vLLM prints goes to stderr."""
    answers_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(module_name)
    found = {}
    for name, rule in vars(module).items():
        if not name.startswith("rule_"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                rule(Path(folder))
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    json.dump(found, answers_out)
    answers_out.close()


if __name__ == "__main__":
    main(sys.argv[1])
