"""Rules of the gloo ranks that need no second process; for those with more see tests/ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hicache_core.errors import ConfigError, RankLost
from hicache_core.ranks.gloo import TorchRankGroup
from hicache_core.ranks.process_state import Process


def alone(tmp_path: Path, **arguments: float) -> TorchRankGroup:
    store = f"file://{tmp_path / 'meeting'}"
    return TorchRankGroup.create(0, 1, store, timeout_s=5.0, **arguments)  # type: ignore[arg-type]


def test_one_rank_agrees_with_itself(tmp_path: Path) -> None:
    with alone(tmp_path, window=3) as group:
        assert (group.rank, group.world_size, group.window) == (0, 1, 3)
        assert group.agree_min([5, -(2**40), 2**40]) == [5, -(2**40), 2**40]
        assert group.gather("") == [""]
        assert group.gather("é\0x") == ["é\0x"]


def test_an_agreement_has_a_fixed_shape(tmp_path: Path) -> None:
    with alone(tmp_path, window=3) as group, pytest.raises(ValueError, match="3 values; given"):
        group.agree_min([1, 2])


def test_who_has_left_has_lost_the_others(tmp_path: Path) -> None:
    group = alone(tmp_path, window=1)
    group.close()
    group.close()
    with pytest.raises(RankLost, match="rank 0 of 1 has left the group"):
        group.agree_min([1])
    with pytest.raises(RankLost, match="has left"):
        group.gather("x")


@pytest.mark.parametrize("store", ["127.0.0.1:1234", "tcp://127.0.0.1", "http://x:1", "file:"])
def test_an_address_that_is_none_is_named(store: str) -> None:
    with pytest.raises(ConfigError, match="ranks cannot meet at"):
        TorchRankGroup.create(0, 1, store, timeout_s=5.0)


@pytest.mark.parametrize("arguments", [{"window": 0}, {"timeout_s": 0.0}, {"timeout_s": -1.0}])
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, float]) -> None:
    class Group:
        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 1

    with pytest.raises(ConfigError, match="must be positive"):
        TorchRankGroup(Group(), **arguments)  # type: ignore[arg-type]


def test_a_process_is_seen_to_run_to_stop_and_to_go() -> None:
    script = (
        "import dataclasses, json; from hicache_core.ranks.process_state import Process;"
        "print(json.dumps(dataclasses.asdict(Process.this())), flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    with child:
        assert child.stdout is not None
        process = Process(**json.loads(child.stdout.readline()))
        assert process.pid == child.pid
        assert process.state == "runs"
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert process.state == "is stopped"
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process.state == "is gone"  # though nobody has waited for it yet
    assert process.state == "is gone"


def test_a_number_that_is_used_again_is_another_process() -> None:
    this = Process.this()
    assert this.state == "runs"
    assert replace(this, started="1").state == "is gone"
    assert replace(this, place="another boot").state == "is on another machine"
    assert replace(this, place="").state == "is on another machine"
