"""`hicache doctor mooncake` says what is wrong and what to change."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hicache_mooncake import MooncakeBackend

from hicache_core.storage.base import Clearable, Diagnosable, HasStats, RegistersMemory


def findings(backend: MooncakeBackend) -> dict[str, tuple[str, str]]:
    return {finding.topic: (finding.level, finding.message) for finding in backend.diagnose()}


def test_a_backend_has_the_capabilities_that_it_documents(backend: MooncakeBackend) -> None:
    for capability in (RegistersMemory, Clearable, HasStats, Diagnosable):
        assert isinstance(backend, capability)


def test_a_healthy_store_is_described_and_left_as_it_was(
    master: Any, backend: MooncakeBackend
) -> None:
    found = findings(backend)
    assert found["library"][0] == "ok"
    assert "0.3." in found["library"][1]
    assert found["master"][0] == "ok"
    assert found["segment"] == ("ok", "this process lends 0.06 GiB")
    assert found["lease"] == ("ok", "longer than 0.3 s")
    assert found["master health"][0] == "warning"  # its metrics port is not the default
    assert "master_metrics_port" in found["master health"][1]
    assert not backend.exists("hicache/doctor")


@pytest.mark.parametrize(("level", "is_told"), [("", False), ("INFO", True)])
def test_doctor_is_not_drowned_by_what_mooncake_logs(
    master: Any, level: str, *, is_told: bool
) -> None:
    settings = {"master_server_address": master.address, "global_segment_size": "64MiB"}
    arguments = ["doctor", "mooncake", "--config", json.dumps(settings)]
    env = {name: value for name, value in os.environ.items() if name != "MC_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-m", "hicache_core.cli.main", *arguments],
        env=env | ({"MC_LOG_LEVEL": level} if level else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "answers in" in done.stdout
    assert bool(re.search(r"^I\d{4} ", done.stderr, re.MULTILINE)) == is_told


def test_a_short_lease_no_room_and_a_lost_master_are_found(
    make_master: Callable[..., Any], make_backend: Callable[..., MooncakeBackend]
) -> None:
    server = make_master(lease_ms=50)
    backend = make_backend(
        server.address, global_segment_size=0, master_metrics_port=server.metrics_port
    )
    found = findings(backend)
    assert found["master health"][0] == "ok"
    assert found["segment"][0] == "warning"
    assert found["round trip"][0] == "error"
    assert "-200" in found["round trip"][1]

    lender = make_backend(server.address)
    found = findings(lender)
    assert found["lease"][0] == "warning"
    assert "default_kv_lease_ttl" in found["lease"][1]

    lender.close()
    server.kill()
    assert findings(backend)["master"][0] == "error"
    server.restart()
