"""Pages of engines in a real Mooncake store: several lengths, and writers that are killed.

Another process lends the memory: what a killed writer lends itself goes with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.foreign_rules import (
    a_page_of_another_length_is_a_miss,
    killed_writers_leave_what_was_answered_and_no_wrong_page,
    namespaces_of_several_lengths_share_a_store,
)
from tests.servers.mooncake import running_mooncake


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Settings of a backend that lends no memory."""
    with running_mooncake(tmp_path_factory.mktemp("mooncake"), 256 << 20) as master:
        yield {
            "master_server_address": master.address,
            "global_segment_size": 0,
            "rpc_timeout_s": 1.0,
        }


def test_namespaces_of_several_lengths_share_a_store(chosen: dict[str, Any]) -> None:
    namespaces_of_several_lengths_share_a_store("mooncake", chosen)
    a_page_of_another_length_is_a_miss("mooncake", chosen)


def test_a_killed_engine_loses_nothing_that_was_answered(chosen: dict[str, Any]) -> None:
    killed_writers_leave_what_was_answered_and_no_wrong_page("mooncake", chosen, n_kills=1)
