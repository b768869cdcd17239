"""Real weights with windows: Gemma 3 270M, from device, host and storage, as plain generation."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicache_core.demo.script import HANDBOOK
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import Request, SamplingParams
from tests.engine.test_engine import Client, engine_of
from tests.engine.world import cache_config, plain

QUESTIONS = ["When does it open?", "What is a fine?", "Who has the keys?"]
N_NEW = 6
PAGE_SIZE = 16
LENGTHS = (240, 450, 900)
"""Words of the handbook in each prompt: below the window of 512 tokens, over it, far over it."""


def ask(loaded: LoadedModel, n_words: int, question: str) -> list[int]:
    """The prompt's tokens."""
    text = " ".join(HANDBOOK.split()[:n_words])
    ids: list[int] = loaded.tokenizer(f"{text}\nQ: {question}\nA:")["input_ids"]
    return ids


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prompts_around_the_window_are_answered_as_alone_from_every_tier(
    gemma3: LoadedModel, tmp_path: Path
) -> None:
    prompts = [ask(gemma3, *one) for one in zip(LENGTHS, QUESTIONS, strict=True)]
    window = gemma3.model.config.sliding_window
    assert len(prompts[0]) < window < len(prompts[1]) < 2 * window < len(prompts[2])
    expected = [plain(gemma3, prompt, N_NEW) for prompt in prompts]
    known = [(len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE for prompt in prompts]
    config = cache_config(
        page_size=PAGE_SIZE, hicache_storage_backend="file", extra={"path": str(tmp_path)}
    )
    sampling = SamplingParams(max_new_tokens=N_NEW, temperature=0.0)
    for life in range(2):
        with engine_of(gemma3, config, device_tokens=4096, chunk_tokens=200) as engine:
            clients = [Client() for _ in prompts]
            for n, (prompt, client) in enumerate(zip(prompts, clients, strict=True)):
                engine.submit(Request(f"{life}-{n}", tuple(prompt), sampling), client)
            for n, client in enumerate(clients):
                last = client.wait()
                assert client.tokens == expected[n]
                assert life == 0 or last.cached.total == known[n]
                assert life == 0 or last.cached.storage > 0
            for n, prompt in enumerate(prompts):
                again = Client()
                engine.submit(Request(f"again-{n}", tuple(prompt), sampling), again)
                assert again.wait().cached.device == known[n]
                assert again.tokens == expected[n]
