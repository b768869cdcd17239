"""LMCache before vLLM with its own file store: what they do without us.

These are claims of docs/engines.md, and what the tests with our store are compared with.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.environments import VLLM, running
from tests.engines.lmcache_server import CHUNK_TOKENS, lmcache_server
from tests.engines.scene import PROMPTS, ask, flip, tokens, wait_until, whole

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

CACHED = whole(CHUNK_TOKENS)


def test_a_second_server_hits_and_damaged_chunks_change_what_vllm_answers(
    model: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    adapter = {"type": "fs", "base_path": str(store)}
    plain = {"model": str(model)}
    n_chunks = len(PROMPTS) * CACHED // CHUNK_TOKENS
    with (
        lmcache_server(tmp_path, adapter) as server,
        running(VLLM, tmp_path, plain, {**plain, "kv_transfer_config": server.transfer}) as engines,
    ):
        without, first = engines
        expected = tokens(ask(without))
        assert tokens(ask(first)) == expected
        wait_until(lambda: len(list(store.glob("*.data"))) == n_chunks, "every chunk is stored")
    with (
        lmcache_server(tmp_path, adapter) as server,
        running(VLLM, tmp_path, {**plain, "kv_transfer_config": server.transfer}) as (second,),
    ):
        answers = ask(second)
        assert tokens(answers) == expected
        assert [answer["cached"] for answer in answers] == [CACHED, CACHED]
        assert second.ask("forget")
        server.forget()
        for chunk in store.glob("*.data"):
            flip(chunk)
        answers = ask(second)
        assert [answer["cached"] for answer in answers] == [CACHED, CACHED]
        assert tokens(answers) != expected
