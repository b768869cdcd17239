"""LMCache before vLLM with its own file store: what they do without us.

These are claims of docs/engines.md, and what the tests with our store are compared with.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines import options
from tests.engines.environments import VLLM, running
from tests.engines.lmcache_server import CHUNK_TOKENS, lmcache_server
from tests.engines.scene import N_NEW, PROMPTS, Engine, flip

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


def test_its_own_store_is_hit_and_damaged_chunks_change_what_vllm_answers(
    model: Path, tmp_path: Path
) -> None:
    adapter = {"type": "fs", "base_path": str(tmp_path / "store")}
    with (
        lmcache_server(tmp_path, adapter) as server,
        running(
            VLLM, tmp_path, options.vllm(model), options.vllm(model, server.transfer)
        ) as children,
    ):
        without, filling = children
        expected = Engine(without, CHUNK_TOKENS, "cached").alone()
        Engine(filling, CHUNK_TOKENS, "cached", server).store_all(expected)
    with (
        lmcache_server(tmp_path, adapter) as server,
        running(VLLM, tmp_path, options.vllm(model, server.transfer)) as (child,),
    ):
        second = Engine(child, CHUNK_TOKENS, "cached", server)
        everything = [second.n_cached] * len(PROMPTS)
        assert second.hits(expected) == everything
        for chunk in (tmp_path / "store").glob("*.data"):
            flip(chunk)
        second.forget()
        answers = child.ask("generate", prompts=PROMPTS, n_new=N_NEW)
        assert [answer["cached"] for answer in answers] == everything
        assert [answer["tokens"] for answer in answers] != expected
