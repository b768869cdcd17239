"""Writers killed with SIGKILL lose nothing that was acknowledged, and leave nothing behind.

They are killed 200 times, at random moments, on the file backend.

Set HICACHE_TEST_KILLS for other than 200 kills, HICACHE_TEST_SEED for another plan of moments.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

N_KILLS = int(os.environ.get("HICACHE_TEST_KILLS", "200"))
SEED = int(os.environ.get("HICACHE_TEST_SEED", "7"))
ROOMY, SMALL = 4 << 30, 6_000_000


def figures_of(path: Path, *arguments: object) -> dict[str, int]:
    """Runs the driver in a process of its own, which forks, and so must have no threads."""
    command = [sys.executable, "-m", "tests.crash.driver", str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    shutil.rmtree(path, ignore_errors=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    figures = json.loads(done.stdout)
    print(f"seed {SEED}: {figures}")
    return dict(figures)


@pytest.mark.parametrize(
    ("max_nbytes", "share", "witness"),
    [(ROOMY, 0.4, []), (SMALL, 0.4, []), (ROOMY, 0.1, ["--witness"]), (SMALL, 0.1, ["--witness"])],
    ids=["all_fits", "evicting", "all_fits_two_writers", "evicting_two_writers"],
)
def test_a_killed_writer_loses_nothing_that_was_acknowledged(
    tmp_path: Path, max_nbytes: int, share: float, witness: list[str]
) -> None:
    n_kills = max(2, round(N_KILLS * share))
    given = ["--max-nbytes", max_nbytes, "--kills", n_kills, "--seed", SEED, *witness]
    figures = figures_of(tmp_path / "store", *given)
    assert figures["kills"] == n_kills
    assert min(figures["interrupted"], figures["deleted"], figures["owed"], figures["read"]) > 0
    if max_nbytes == SMALL:
        assert figures["owed"] < figures["acknowledged"] - figures["deleted"], "some were evicted"
