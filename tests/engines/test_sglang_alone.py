"""SGLang with its own file store: what it does without us, and that this CPU shows it.

These are claims of docs/engines.md, and what the tests with our store are compared with.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines import options
from tests.engines.child import Child
from tests.engines.environments import SGLANG, running
from tests.engines.scene import N_NEW, PROMPTS, Engine, flip

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

PAGE_SIZE = 64
FILE = {"hicache_storage_backend": "file"}


def at(store: Path) -> dict[str, str]:
    """Where its own file store is."""
    return {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(store)}


def wrong_hits(engine: Child, expected: list[list[int]]) -> bool:
    """Whether it takes all pages from the store and answers wrongly."""
    answers = engine.ask("generate", prompts=PROMPTS, n_new=N_NEW)
    everything = (len(PROMPTS[0]) - 1) // PAGE_SIZE * PAGE_SIZE
    assert [answer["from_storage"] for answer in answers] == [everything] * len(PROMPTS)
    return [answer["tokens"] for answer in answers] != expected


@pytest.mark.parametrize("version", SGLANG)
def test_its_own_store_is_hit_and_damaged_pages_change_what_it_answers(
    version: str, model: Path, tmp_path: Path
) -> None:
    where = at(tmp_path / "store")
    own = options.sglang(model, hicache_mem_layout="page_first", **FILE)
    with running(version, tmp_path, options.sglang(model), own, variables_of=where) as children:
        without, filling = children
        expected = Engine(without, PAGE_SIZE, "cached").alone()
        Engine(filling, PAGE_SIZE, "from_storage").store_all(expected)
    with running(version, tmp_path, own, variables_of=where) as (child,):
        second = Engine(child, PAGE_SIZE, "from_storage")
        assert second.hits(expected) == [second.n_cached] * len(PROMPTS)
        for page in (tmp_path / "store").glob("*.bin"):
            flip(page)
        second.forget()
        assert wrong_hits(child, expected)


def test_its_own_store_answers_another_layout_with_pages_that_it_cannot_read(
    model: Path, tmp_path: Path
) -> None:
    where = at(tmp_path / "store")
    rows = options.sglang(model, hicache_mem_layout="page_first", **FILE)
    direct = options.sglang(
        model, hicache_mem_layout="page_first_direct", hicache_io_backend="direct", **FILE
    )
    with running(SGLANG[0], tmp_path, rows, variables_of=where) as (child,):
        first = Engine(child, PAGE_SIZE, "from_storage")
        expected = first.alone()
        first.store_all(expected)
    with running(SGLANG[0], tmp_path, direct, variables_of=where) as (child,):
        assert wrong_hits(child, expected)
