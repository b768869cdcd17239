"""The adapters for vLLM on vLLM's own classes, in vLLM's environment: no model runs here."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.engines.environments import VLLM, program, variables

FOLDER = Path(__file__).parent
MODULES = ["vllm_connector_rules", "vllm_tier_rules"]
LIMIT_S = 240


def rules() -> list[tuple[str, str]]:
    """Every rule: its module and its name."""
    return [
        (module, node.name)
        for module in MODULES
        for node in ast.parse((FOLDER / f"{module}.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("rule_")
    ]


@functools.cache
def outcome(module: str) -> Mapping[str, str]:
    """The traceback of each rule, empty if it holds; the child runs all rules of a module."""
    command = [program(VLLM), FOLDER / "vllm_rules.py", module]
    ran = subprocess.run(
        command,
        env=variables(VLLM, {}),
        capture_output=True,
        timeout=LIMIT_S,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, str] = json.loads(ran.stdout)
    return found


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("module", "rule"), rules())
def test_vllm(module: str, rule: str) -> None:
    failure = outcome(module)[rule]
    assert not failure, failure
