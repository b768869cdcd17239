"""The real model: conversations at once, from device, host and storage, as plain generation."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import Request, SamplingParams
from tests.engine.test_engine import Client, engine_of
from tests.engine.world import cache_config, plain

SYSTEM = "You are a librarian who answers in one short sentence. " * 3
QUESTIONS = ["What is a radix tree?", "Name a river in Europe."]
N_NEW = 6
PAGE_SIZE = 16


def ask(loaded: LoadedModel, question: str) -> list[int]:
    """The prompt's tokens."""
    ids: list[int] = loaded.tokenizer(f"{SYSTEM}\nQ: {question}\nA:")["input_ids"]
    return ids


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2_answers_as_it_does_alone_from_every_tier(
    smollm2: LoadedModel, tmp_path: Path
) -> None:
    prompts = [ask(smollm2, question) for question in QUESTIONS]
    expected = [plain(smollm2, prompt, N_NEW) for prompt in prompts]
    config = cache_config(
        page_size=PAGE_SIZE, hicache_storage_backend="file", extra={"path": str(tmp_path)}
    )
    sampling = SamplingParams(max_new_tokens=N_NEW, temperature=0.0)
    for life in range(2):
        with engine_of(smollm2, config, device_tokens=1024, chunk_tokens=64) as engine:
            clients = [Client() for _ in prompts]
            for n, (prompt, client) in enumerate(zip(prompts, clients, strict=True)):
                engine.submit(Request(f"{life}-{n}", tuple(prompt), sampling), client)
            for n, client in enumerate(clients):
                last = client.wait()
                assert client.tokens == expected[n]
                text = "".join(output.text for output in client.outputs)
                whole = smollm2.tokenizer.decode(expected[n], skip_special_tokens=True)
                assert text == whole
                known = (len(prompts[n]) - 1) // PAGE_SIZE * PAGE_SIZE
                assert life == 0 or last.cached.total == known
            again = Client()
            engine.submit(Request("again", tuple(prompts[0]), sampling), again)
            assert again.wait().cached.device == (len(prompts[0]) - 1) // PAGE_SIZE * PAGE_SIZE
            assert again.tokens == expected[0]
