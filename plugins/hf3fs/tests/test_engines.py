"""Pages of engines in slots of slab files: several lengths, and writers that are killed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from hicache_core.integrations.foreign.opening import open_store
from tests.foreign_rules import (
    a_page_of_another_length_is_a_miss,
    killed_writers_leave_what_was_answered_and_no_wrong_page,
    namespaces_of_several_lengths_share_a_store,
)
from tests.servers.valkey import Valkey
from tests.unit.integrations.foreign_world import keys_of, pages_of

FILE_SIZE = 256 << 20


@pytest.fixture(params=["sqlite", "redis"])
def chosen(request: pytest.FixtureRequest, tmp_path: Path, own_valkey: Valkey) -> dict[str, object]:
    """Settings on each metadata store."""
    settings: dict[str, object] = {
        "file_path_prefix": str(tmp_path / "kv"),
        "file_size": FILE_SIZE,
        "mode": "posix",
    }
    return settings | ({"metadata_url": own_valkey.url} if request.param == "redis" else {})


def test_namespaces_of_several_lengths_share_the_slots(chosen: dict[str, object]) -> None:
    namespaces_of_several_lengths_share_a_store("hf3fs", chosen)
    a_page_of_another_length_is_a_miss("hf3fs", chosen)


def test_a_killed_engine_loses_nothing_that_was_answered(chosen: dict[str, object]) -> None:
    killed_writers_leave_what_was_answered_and_no_wrong_page("hf3fs", chosen, n_kills=1)


def test_a_page_longer_than_a_slot_is_answered_no_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"file_path_prefix": str(tmp_path / "kv"), "file_size": FILE_SIZE, "mode": "posix"}
    with closing(open_store("hf3fs", settings, object_nbytes=4096)) as store:
        pages = [*pages_of([0], 4096), *pages_of([1], 100_000), *pages_of([2], 4096)]
        assert store.write(keys_of(range(3)), pages).mask == [True, False, True]
        assert store.write(keys_of([3]), pages_of([3], 50_000)).mask == [False]
    said = [record.getMessage() for record in caplog.records if "slot_nbytes" in record.message]
    assert len(said) == 1
    assert said[0].startswith("objects of more than ")
