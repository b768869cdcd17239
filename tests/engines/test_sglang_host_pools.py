"""Our backend around SGLang's own host pools, controller functions and file store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from hicache_core.integrations.sglang.pools import LAYOUTS
from tests.engines.child import Child
from tests.engines.environments import SGLANG, program, variables

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

N_PAGES = 12
PATHS = ("v1", "tensors")


@pytest.fixture(scope="module", params=SGLANG)
def sglang(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Child]:
    """A process with SGLang's modules."""
    with process(request.param, tmp_path_factory.mktemp("stores")) as child:
        yield child


@contextlib.contextmanager
def process(version: str, folder: Path) -> Iterator[Child]:
    """A process with the modules of one version; its stores are in a folder."""
    command = [program(version), "-P", "-m", "sglang_pools", str(folder)]
    child = Child(command, variables(version, {}), folder / "log")
    try:
        child.wait_until_ready()
        yield child
    finally:
        child.kill()


def test_both_versions_find_the_same_pages(tmp_path: Path) -> None:
    prefixes = []
    for version in SGLANG:
        folder = tmp_path / version
        folder.mkdir()
        with process(version, folder) as child:
            prefixes.append(child.ask("stored_under"))
    assert prefixes[0] == prefixes[1]
    assert len(set(prefixes[0])) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["heads", "latent"])
def test_what_sglangs_controller_stores_it_reads_through_either_path(
    sglang: Child, kind: str, layout: str
) -> None:
    if kind == "latent" and layout == "page_head":
        pytest.skip("SGLang has no such pool")
    for writer in PATHS:
        for reader in PATHS:
            found = sglang.ask("round_trip", kind=kind, layout=layout, writer=writer, reader=reader)
            assert found == {
                "absent": 0,
                "stored": [True, True],
                "found": N_PAGES,
                "read": [N_PAGES, 0],
                "equal": [True] * N_PAGES,
            }


def test_of_ranks_with_the_same_pages_one_stores_and_all_read(sglang: Child) -> None:
    found = sglang.ask("one_writer")
    assert found == {"stored": [[True, 0], [True, N_PAGES]], "read": N_PAGES}


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_side_pools_are_answered_as_by_sglangs_own_file_store(sglang: Child, layout: str) -> None:
    found = sglang.ask("side_pools", seed=len(layout), n_stores=40, layout=layout)
    assert found["different"] == []
    assert found["compared"] > 400


@pytest.mark.parametrize(
    ("extra", "layout", "version", "sentence"),
    [
        ({}, "page_unified", None, "SpecError: the host pool has layout 'page_unified'"),
        ({"backend": "nosuch"}, "page_first", None, "UnknownBackend: no backend named 'nosuch'"),
        ({"backend": "file", "backend_config": {}}, "page_first", None, "ConfigError: "),
        ({"backen": "file"}, "page_first", None, "did you mean 'backend'?"),
        ({}, "page_first", "0.5.24", "ConfigError: SGLang is 0.5.24, and this adapter was tested"),
        ({"allow_untested_version": True}, "page_first", "0.5.24", ""),
    ],
)
def test_what_cannot_work_is_refused_when_sglang_attaches(
    sglang: Child, extra: dict[str, object], layout: str, version: str | None, sentence: str
) -> None:
    said = sglang.ask("refusal", extra=extra, layout=layout, version=version)
    assert sentence in said
    assert bool(said) == bool(sentence)
    assert len(said.splitlines()) <= 1


def test_a_store_that_other_ranks_cannot_reach_is_refused_if_one_rank_stores_for_all(
    sglang: Child,
) -> None:
    memory = {"backend": "memory", "backend_config": {}}
    ranks = {"is_mla_model": True, "tp_size": 2}
    said = sglang.ask("refusal", extra=memory, layout="page_first", **ranks)
    assert said.startswith("ConfigError: backend 'memory' keeps its objects in one process")
    assert sglang.ask("refusal", extra=memory, layout="page_first", tp_size=2) == ""


def test_sglangs_metrics_take_what_was_moved(sglang: Child) -> None:
    assert sglang.ask("stats") == [[N_PAGES], 1, [], True, 0]


def test_sglangs_own_file_store_runs_behind_our_seal_and_guard(
    sglang: Child, tmp_path: Path
) -> None:
    found = sglang.ask(
        "class_for_sglang",
        module="sglang.srt.mem_cache.hicache_storage",
        class_name="HiCacheFile",
        n_pages=6,
        file_storage_path=str(tmp_path / "theirs"),
    )
    assert found == {"stored": 6, "found": 6, "read": 6, "equal": True, "errors": []}
    assert len(list((tmp_path / "theirs").glob("*.bin"))) >= 6
