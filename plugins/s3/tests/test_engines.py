"""Pages of engines in a real bucket: several lengths, packed or not, and killed writers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.foreign_rules import (
    a_frozen_store_is_answered_in_time_and_touches_nothing,
    a_page_of_another_length_is_a_miss,
    killed_writers_leave_what_was_answered_and_no_wrong_page,
    namespaces_of_several_lengths_share_a_store,
)
from tests.servers.weed import Weed, settings


def in_bucket(weed: Weed, path: Path, **options: Any) -> dict[str, Any]:
    """Settings with a prefix of the test."""
    return settings(weed.url, prefix=f"{path.name}/", **options)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "single"])
def test_namespaces_of_several_lengths_share_a_bucket(
    weed: Weed, tmp_path: Path, pack: bool
) -> None:
    chosen = in_bucket(weed, tmp_path, pack=pack)
    namespaces_of_several_lengths_share_a_store("s3", chosen)
    a_page_of_another_length_is_a_miss("s3", chosen)


def test_a_killed_engine_loses_nothing_that_was_answered(weed: Weed, tmp_path: Path) -> None:
    chosen = in_bucket(weed, tmp_path)
    killed_writers_leave_what_was_answered_and_no_wrong_page("s3", chosen, n_kills=1)


def test_a_frozen_server_is_answered_in_time_and_touches_nothing(
    own_weed: Weed, tmp_path: Path
) -> None:
    chosen = in_bucket(own_weed, tmp_path)
    a_frozen_store_is_answered_in_time_and_touches_nothing("s3", chosen, own_weed)
