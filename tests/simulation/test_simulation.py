"""Many random lives of the controller, and that they reach what they are meant to test."""

from __future__ import annotations

import faulthandler
import subprocess
import sys
from random import Random

import pytest
from click.testing import CliRunner

from tests.simulation.__main__ import main, report
from tests.simulation.link import damaged
from tests.simulation.runner import run_many
from tests.simulation.schedule import N_STEPS, run_schedule

REACHED = (
    "crashes",
    "device_hit_tokens",
    "evicted_device_pages",
    "evicted_host_pages",
    "failed_loads",
    "host_hit_tokens",
    "jobs_cancelled",
    "jobs_failed",
    "jobs_hanging",
    "jobs_overdue",
    "load_back_skipped_pages",
    "load_back_tokens",
    "pages_stored_from_host",
    "prefetch_dropped_pages",
    "prefetch_failed_pages",
    "prefetch_given_up",
    "storage_loaded_tokens",
    "store_skipped_pages",
    "store_dropped_pages",
    "started_over",
    "steps_with_orphaned_pages",
    "steps_with_orphaned_reads",
    "steps_with_unit_backups",
    "steps_with_unit_loads",
    "steps_with_unit_reads",
    "steps_with_unit_stores",
    "steps_with_units_let_go",
    "stored_pages",
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_invariant_holds_in_many_schedules(full: bool) -> None:
    """Ten thousand at full depth, else the first five hundred of them."""
    faulthandler.cancel_dump_traceback_later()  # on a machine that is not idle it takes longer
    n_schedules, often = (10_000, 100) if full else (500, 1)
    outcome = run_many(n_schedules, seed=0, n_jobs=None if full else 1)
    print(outcome)
    if outcome.failure is not None:
        pytest.fail(report(outcome.failure, None, None, N_STEPS), pytrace=False)
    assert outcome.n_schedules == n_schedules
    missing = [what for what in REACHED if outcome.tally[what] < often]
    assert not missing, "the schedules hardly ever get there"


def test_pages_that_two_stores_read_are_freed_once() -> None:
    """A second backend is attached while a write hangs, and the node leaves the tree: seed 723."""
    assert run_schedule(723)["steps_with_orphaned_pages"] > 0


def test_an_object_that_was_cut_to_nothing_may_be_damaged_again() -> None:
    assert {damaged(b"", Random(seed)) for seed in range(9)} == {b""}


def test_a_schedule_is_a_function_of_its_seed() -> None:
    assert run_schedule(3, ranks=2) == run_schedule(3, ranks=2)


def test_a_schedule_does_not_depend_on_the_process() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seed", "5"]
    command += ["--schedules", "2", "--verbose"]
    said = {
        subprocess.run(
            command, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert b"check rest" in said.pop()


def test_the_command_says_how_much_it_did() -> None:
    result = CliRunner().invoke(main, ["--schedules", "3", "--seed", "7", "--jobs", "1"])
    assert result.exit_code == 0
    assert "3 schedules from seed 7" in result.output
    assert "all invariants held" in result.output
