"""SGLang with its own file store: what it does without us, and that this CPU shows it.

These are claims of docs/engines.md, and what the tests with our store are compared with.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.engines.child import Child
from tests.engines.environments import SGLANG, running
from tests.engines.models import prompt

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

PROMPTS = [prompt(0), prompt(1)]
PAGE_SIZE = 64
CACHED = (len(PROMPTS[0]) - 1) // PAGE_SIZE * PAGE_SIZE


def tokens(engine: Child) -> list[list[int]]:
    """What the engine answers."""
    return [answer["tokens"] for answer in engine.ask("generate", prompts=PROMPTS, n_new=8)]


def stored(store: Path, n_pages: int) -> list[Path]:
    """The files of a store, once it has so many."""
    until = time.monotonic() + 30
    while len(found := sorted(store.glob("*.bin"))) < n_pages:
        assert time.monotonic() < until, f"{len(found)} of {n_pages} pages were stored"
        time.sleep(0.05)
    return found


def flip(page: Path) -> None:
    """Flips the highest bit of each 1,024th value."""
    damaged = bytearray(page.read_bytes())
    for high_byte in range(1, len(damaged), 2048):
        damaged[high_byte] ^= 0x40
    page.write_bytes(damaged)


@pytest.mark.parametrize("version", SGLANG)
def test_a_second_process_hits_and_damaged_pages_change_what_it_answers(
    version: str, model: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    own = {
        "model_path": str(model),
        "hicache_storage_backend": "file",
        "hicache_mem_layout": "page_first",
    }
    where = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(store)}
    with running(version, tmp_path, {"model_path": str(model)}, own, variables_of=where) as (
        plain,
        first,
    ):
        expected = tokens(plain)
        assert tokens(first) == expected
        pages = stored(store, 2 * CACHED // PAGE_SIZE)
    with running(version, tmp_path, own, variables_of=where) as (second,):
        answers = second.ask("generate", prompts=PROMPTS, n_new=8)
        assert [answer["tokens"] for answer in answers] == expected
        assert [answer["from_storage"] for answer in answers] == [CACHED, CACHED]
        second.ask("forget")
        for page in pages:
            flip(page)
        answers = second.ask("generate", prompts=PROMPTS, n_new=8)
        assert [answer["from_storage"] for answer in answers] == [CACHED, CACHED]
        assert [answer["tokens"] for answer in answers] != expected
