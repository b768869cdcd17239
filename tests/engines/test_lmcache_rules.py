"""The adapter for LMCache on LMCache's own classes, in its environment: no model runs here.

``make engines`` builds that environment and sets ``HICACHE_ENGINES``.
"""

from __future__ import annotations

import ast
import os

import pytest

from tests.engines.test_vllm_rules import FOLDER, outcome

MODULE = "lmcache_rules"
RULES = [
    node.name
    for node in ast.parse((FOLDER / f"{MODULE}.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("rule_")
]


@pytest.mark.full
@pytest.mark.skipif("HICACHE_ENGINES" not in os.environ, reason="needs LMCache: run make engines")
@pytest.mark.parametrize("rule", RULES)
def test_lmcache(rule: str) -> None:
    failure = outcome(MODULE)[rule]
    assert not failure, failure
