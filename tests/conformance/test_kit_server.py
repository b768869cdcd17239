"""The rules about servers, on a real server that is killed, frozen and restarted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from hicache_core.testing.control import ServerProcess
from hicache_core.testing.features import Feature, Target
from hicache_core.testing.kit_settings import KitSettings
from hicache_core.testing.recipe import Recipe
from hicache_core.testing.rules import RULES
from hicache_core.testing.runner import run
from tests.conformance.defects_server import DEFECTS, TcpBackend
from tests.conformance.tcp_store import start
from tests.servers.process import free_port

SETTINGS = KitSettings(
    batch_page_nbytes=1024,
    race_nbytes=16 << 10,
    large_nbytes=1 << 20,
    rule_s=10.0,
    answer_s=1.2,
    recover_s=2.0,
)
BY_ID = {rule.id: rule for rule in RULES}


def with_needs(rule_id: str) -> set[str]:
    """``rule_id`` and all that it builds on."""
    return {rule_id}.union(*(with_needs(need) for need in BY_ID[rule_id].needs))


CONTROL_IDS = [rule.id for rule in RULES if Feature.CONTROL in rule.requires]
WANTED = set().union(*(with_needs(rule_id) for rule_id in CONTROL_IDS))
SERVER_RULES = [rule for rule in RULES if rule.id in WANTED]


@pytest.fixture
def server() -> Iterator[tuple[int, ServerProcess]]:
    """A running server and its port."""
    port = free_port()
    process = ServerProcess(partial(start, port))
    yield port, process
    process.close()


def test_the_right_client_passes_every_rule(server: tuple[int, ServerProcess]) -> None:
    target = Target(Recipe.of(TcpBackend, {"port": server[0]}), control=server[1])
    report = run(target, SETTINGS, rules=SERVER_RULES, figures=False)
    assert [(r.id, r.message) for r in report.results if r.status != "passed"] == []


@pytest.mark.parametrize("cls", DEFECTS, ids=lambda c: c.__name__)
def test_a_wrong_client_fails_by_its_rule_and_no_other(
    cls: type[TcpBackend], server: tuple[int, ServerProcess]
) -> None:
    target = Target(Recipe.of(cls, {"port": server[0]}), control=server[1])
    report = run(target, SETTINGS, rules=SERVER_RULES, figures=False)
    failed = [(r.id, r.message) for r in report.results if r.status == "failed"]
    assert [rule_id for rule_id, _ in failed] == [(cls.__doc__ or "").strip()], failed
