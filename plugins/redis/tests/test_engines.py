"""Pages of engines on a real server: several lengths, and writers that are killed."""

from __future__ import annotations

from tests.foreign_rules import (
    a_frozen_store_is_answered_in_time_and_touches_nothing,
    a_page_of_another_length_is_a_miss,
    killed_writers_leave_what_was_answered_and_no_wrong_page,
    namespaces_of_several_lengths_share_a_store,
)
from tests.servers.valkey import Cluster, Valkey


def test_namespaces_of_several_lengths_share_a_server(own_server: Valkey) -> None:
    settings = {"url": own_server.url}
    namespaces_of_several_lengths_share_a_store("redis", settings)
    a_page_of_another_length_is_a_miss("redis", settings)


def test_a_killed_engine_loses_nothing_that_was_answered(own_server: Valkey) -> None:
    settings = {"url": own_server.url}
    killed_writers_leave_what_was_answered_and_no_wrong_page("redis", settings)


def test_namespaces_of_several_lengths_share_a_cluster(cluster: Cluster) -> None:
    settings = {"url": cluster.url, "cluster": True}
    namespaces_of_several_lengths_share_a_store("redis", settings)


def test_a_frozen_server_is_answered_in_time_and_touches_nothing(own_server: Valkey) -> None:
    settings = {"url": own_server.url}
    a_frozen_store_is_answered_in_time_and_touches_nothing("redis", settings, own_server)
