"""Gemma 3 270M behind a server: conversations of several turns, beyond its window."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from hicache_core.demo.script import HANDBOOK
from hicache_core.engine.model import LoadedModel
from tests.engine.world import plain
from tests.server.process import PATIENCE_S, ServerProcess, server_process

PAGE_SIZE = 16
N_NEW = 6
START_S = 600.0
"""A start reads and verifies a gigabyte of weights, without a word, and others use the cores."""
QUESTIONS = (
    ("When does it open?", "And on Saturday?"),
    ("What does a card cost?", "Who pays nothing?"),
)


def tokens_of(loaded: LoadedModel, text: str) -> list[int]:
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def asked(server: ServerProcess, prompt: list[int]) -> tuple[tuple[int, ...], dict[str, int]]:
    """The tokens of the answer, and the cached tokens of the prompt by tier."""
    sampling = {"temperature": 0.0, "max_new_tokens": N_NEW, "ignore_eos": True}
    body: dict[str, Any] = {"input_ids": prompt, "sampling_params": sampling}
    found = httpx.post(f"{server.url}/generate", json=body, timeout=5 * PATIENCE_S)
    answer = found.raise_for_status().json()
    return tuple(answer["output_ids"]), answer["meta_info"]["cached_tokens_details"]


def turns(server: ServerProcess, prompts: list[list[int]]) -> list[Any]:
    """One turn of all conversations, at once."""
    with ThreadPoolExecutor(len(prompts)) as clients:
        return list(clients.map(lambda prompt: asked(server, prompt), prompts))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_turn_is_answered_as_alone_also_after_a_restart(
    gemma3: LoadedModel, tmp_path: Path
) -> None:
    """Both conversations share a text of more than a window; the third turn is a new process's."""
    text = " ".join(HANDBOOK.split()[:480])
    shared = [gemma3.tokenizer.bos_token_id, *tokens_of(gemma3, text)]
    assert gemma3.model.config.sliding_window < len(shared)
    histories = [list(shared) for _ in QUESTIONS]
    store = f'{{"path": "{tmp_path}", "prefetch_threshold": {PAGE_SIZE}}}'
    flags = ["--page-size", str(PAGE_SIZE), "--max-total-tokens", "4096", "--hicache-ratio", "2"]
    flags += ["--enable-hierarchical-cache", "--enable-cache-report"]
    flags += ["--hicache-storage-backend", "file", "--hicache-storage-backend-extra-config", store]
    flags += ["--hicache-storage-prefetch-policy", "wait_complete"]
    seen: list[tuple[list[int], tuple[int, ...]]] = []
    with server_process("gemma3-270m", flags, patience_s=START_S) as server:
        for turn in range(2):
            prompts = [
                [*history, *tokens_of(gemma3, f"\nQ: {questions[turn]}\nA:")]
                for history, questions in zip(histories, QUESTIONS, strict=True)
            ]
            for n, (answer, cached) in enumerate(turns(server, prompts)):
                seen.append((prompts[n], answer))
                whole_pages = (len(histories[n]) - 1) // PAGE_SIZE * PAGE_SIZE
                assert turn == 0 or cached["device"] >= whole_pages > 512
                histories[n] = [*prompts[n], *answer]
        assert server.stop() == 0
    with server_process("gemma3-270m", flags, patience_s=START_S) as server:
        prompts = [[*history, *tokens_of(gemma3, "\nQ: Why?\nA:")] for history in histories]
        for n, (answer, cached) in enumerate(turns(server, prompts)):
            seen.append((prompts[n], answer))
            whole_pages = (len(histories[n]) - 1) // PAGE_SIZE * PAGE_SIZE
            assert cached["storage"] + cached["device"] >= whole_pages
            assert cached["storage"] > 0
    gemma3.model.generation_config.eos_token_id, ends = (
        None,
        (gemma3.model.generation_config.eos_token_id),
    )
    try:
        assert [answer for _, answer in seen] == [plain(gemma3, one, N_NEW) for one, _ in seen]
    finally:
        gemma3.model.generation_config.eos_token_id = ends
