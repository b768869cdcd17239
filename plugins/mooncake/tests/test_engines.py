"""Pages of engines in a real Mooncake store: several lengths, and writers that are killed.

Another process lends the memory: what a killed writer lends itself goes with it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hicache_core.testing.control import freeze_process
from tests.foreign_rules import (
    a_frozen_store_is_answered_in_time_and_touches_nothing,
    a_page_of_another_length_is_a_miss,
    killed_writers_leave_what_was_answered_and_no_wrong_page,
    namespaces_of_several_lengths_share_a_store,
)
from tests.servers.mooncake import Master, running_mooncake


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


def test_a_frozen_master_is_answered_in_time_and_touches_nothing(
    chosen: dict[str, Any], make_master: Callable[..., Master], make_peer: Callable[..., Any]
) -> None:
    master = make_master()
    make_peer(master.address)
    master.wait_for_memory()
    settings = {**chosen, "master_server_address": master.address}
    a_frozen_store_is_answered_in_time_and_touches_nothing("mooncake", settings, master)


class Lender:
    """The process that lends the memory; frozen, it does not send what it holds."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def freeze(self) -> None:
        freeze_process(self.pid)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


def test_a_frozen_lender_is_answered_in_time_and_touches_nothing(
    chosen: dict[str, Any], make_master: Callable[..., Master], make_peer: Callable[..., Any]
) -> None:
    """Mooncake waits a minute for it, and writes into the page what comes later."""
    master = make_master()
    lender = Lender(make_peer(master.address).pid)
    master.wait_for_memory()
    settings = {**chosen, "master_server_address": master.address}
    a_frozen_store_is_answered_in_time_and_touches_nothing("mooncake", settings, lender)
