"""A rank that dies or freezes: the others say so within a set time, and can be closed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.ranks.fleet import Fleet, RankFailed

TIMEOUT_S = 2.0
SLACK_S = 15.0
"""The machine may be busy; without the timeout it would take for ever."""


def survivors(fleet: Fleet, lost: int) -> list[int]:
    return [rank for rank in fleet.ranks if rank != lost]


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_when_a_rank_is_killed_the_others_raise_and_close(tmp_path: Path, n_ranks: int) -> None:
    """In the middle of polling, with writes under way that never end."""
    lost = n_ranks - 1
    with Fleet(n_ranks, tmp_path, timeout_s=30.0) as fleet:
        fleet.meet()
        fleet.all("open", str(tmp_path / "store"), trouble={"latency_s": 0.5})
        fleet.same("request", list(range(33)), prefetch=False)
        left = survivors(fleet, lost)
        for rank in fleet.ranks:
            fleet.send(rank, "poll_on")
        start = time.monotonic()
        fleet.kill(lost)
        answers = fleet.receive(left)
        assert time.monotonic() - start < 30.0  # sockets close at once: no timeout is waited for
        for rank, (said, _) in zip(left, answers, strict=True):
            assert said.startswith(f"rank {rank} of {n_ranks} lost the others after")
            assert f"rank {lost} (process {fleet.processes[lost].pid} on " in said
            assert "is gone" in said
        for rank in left:
            fleet.send(rank, "poll_on")  # every further call raises at once
        assert all(took_s < 1.0 for _, took_s in fleet.receive(left))
        for rank in left:
            fleet.send(rank, "close")
        assert all(took_s < 2 * TIMEOUT_S + SLACK_S for took_s in fleet.receive(left))


def test_when_a_rank_freezes_the_others_raise_in_the_set_time(tmp_path: Path) -> None:
    with Fleet(4, tmp_path, timeout_s=TIMEOUT_S) as fleet:
        fleet.meet()
        fleet.all("open", str(tmp_path / "store"))
        fleet.same("request", list(range(33)))
        for rank in fleet.ranks:
            fleet.send(rank, "poll_on")
        fleet.freeze(1)
        try:
            for said, waited_s in fleet.receive([0, 2, 3]):
                assert "rank 1 (process" in said
                assert "is stopped" in said
                assert waited_s < TIMEOUT_S + SLACK_S
        finally:
            fleet.thaw(1)
        (said, _) = fleet.receive([1])[0]  # it wakes up alone, and learns that it is
        assert said.startswith("rank 1 of 4 lost the others")
        fleet.all("close")


def test_a_rank_that_only_is_late_is_no_lost_rank(tmp_path: Path) -> None:
    with Fleet(2, tmp_path, timeout_s=30.0) as fleet:
        fleet.meet()
        fleet.send(0, "agree", 5)
        assert not fleet.pipes[0].poll(0.3)
        fleet.send(1, "agree", 5)
        assert fleet.receive([0, 1]) == [[5], [5]]


def test_ranks_that_were_told_otherwise_do_not_start(tmp_path: Path) -> None:
    """Windows that differ would hang or mix up jobs later."""
    with Fleet(2, tmp_path, group_args=[{"window": 64}, {"window": 128}]) as fleet:
        with pytest.raises(RankFailed) as failed:
            fleet.receive([0, 1])
        assert str(failed.value).count("give all ranks the same") == 2


def test_a_rank_that_never_comes_is_an_error_in_the_set_time(tmp_path: Path) -> None:
    with Fleet(2, tmp_path, timeout_s=TIMEOUT_S) as fleet:
        fleet.kill(1)
        with pytest.raises(RankFailed, match="RankLost: rank 0 of 2 did not meet the others"):
            fleet.receive([0])
