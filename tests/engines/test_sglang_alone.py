"""SGLang with its own file store: what it does without us, and that this CPU shows it.

These are claims of docs/engines.md, and what the tests with our store are compared with.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.environments import SGLANG, running
from tests.engines.scene import PROMPTS, ask, flip, tokens, wait_until, whole

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

PAGE_SIZE = 64
CACHED = whole(PAGE_SIZE)


@pytest.mark.parametrize("version", SGLANG)
def test_a_second_process_hits_and_damaged_pages_change_what_it_answers(
    version: str, model: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    plain = {"model_path": str(model)}
    own = {**plain, "hicache_storage_backend": "file", "hicache_mem_layout": "page_first"}
    where = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(store)}
    n_pages = len(PROMPTS) * CACHED // PAGE_SIZE
    with running(version, tmp_path, plain, own, variables_of=where) as (without, first):
        expected = tokens(ask(without))
        assert tokens(ask(first)) == expected
        wait_until(lambda: len(list(store.glob("*.bin"))) == n_pages, "every page is stored")
    with running(version, tmp_path, own, variables_of=where) as (second,):
        answers = ask(second)
        assert tokens(answers) == expected
        assert [answer["from_storage"] for answer in answers] == [CACHED, CACHED]
        assert second.ask("forget")
        for page in store.glob("*.bin"):
            flip(page)
        answers = ask(second)
        assert [answer["from_storage"] for answer in answers] == [CACHED, CACHED]
        assert tokens(answers) != expected


def test_another_layout_is_answered_with_pages_that_it_cannot_read(
    model: Path, tmp_path: Path
) -> None:
    own = {"model_path": str(model), "hicache_storage_backend": "file"}
    rows = {**own, "hicache_mem_layout": "page_first"}
    direct = {**own, "hicache_mem_layout": "page_first_direct", "hicache_io_backend": "direct"}
    where = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(tmp_path / "store")}
    with running(SGLANG[0], tmp_path, rows, variables_of=where) as (first,):
        expected = tokens(ask(first))
        n_pages = len(PROMPTS) * CACHED // PAGE_SIZE
        wait_until(
            lambda: len(list((tmp_path / "store").glob("*.bin"))) == n_pages, "pages are stored"
        )
    with running(SGLANG[0], tmp_path, direct, variables_of=where) as (second,):
        answers = ask(second)
        assert [answer["from_storage"] for answer in answers] == [CACHED, CACHED]
        assert tokens(answers) != expected
