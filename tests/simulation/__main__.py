"""``python -m tests.simulation``: runs schedules, and replays one that failed."""

from __future__ import annotations

import logging
import random
import sys

import click

from tests.simulation.runner import run_many
from tests.simulation.schedule import N_STEPS, run_schedule
from tests.simulation.trace import ScheduleFailed

MODULE = "tests.simulation"

TRACE_LINES = 30


@click.command(name=f"python -m {MODULE}")
@click.option("--schedules", default=1000, show_default=True, help="How many schedules to run.")
@click.option("--seed", type=int, help="Seed of the first; the next has the next.  [default: any]")
@click.option("--ranks", type=int, help="Ranks in lockstep.  [default: 1, 2 or 4 by the seed]")
@click.option("--groups/--no-groups", default=None, help="With groups of layers, or without.")
@click.option("--steps", default=N_STEPS, show_default=True, help="Random steps of a schedule.")
@click.option("--jobs", type=int, help="Processes.  [default: one for each core]")
@click.option("--verbose", is_flag=True, help="Print each step; in one process.")
def main(
    schedules: int,
    seed: int | None,
    ranks: int | None,
    groups: bool | None,
    steps: int,
    jobs: int | None,
    verbose: bool,
) -> None:
    """Random lives of the controller under a virtual clock; every invariant after each step.

    Ends with status 1 at the first schedule that fails, and prints the command that replays it.
    """
    logging.disable(logging.ERROR)  # the backend fails on purpose, all the time
    first = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    click.echo(f"{schedules} schedules from seed {first}")
    if verbose:
        for each in range(first, first + schedules):
            click.echo(f"seed {each}")
            try:
                run_schedule(each, ranks=ranks, groups=groups, n_steps=steps, is_loud=True)
            except ScheduleFailed as failure:
                _fail(failure, ranks, groups, steps)
        return
    shown = 0

    def progress(n_done: int) -> None:
        nonlocal shown
        if n_done - shown >= 10_000:
            shown = n_done
            click.echo(f"{n_done} schedules done")

    outcome = run_many(
        schedules,
        first,
        ranks=ranks,
        groups=groups,
        n_steps=steps,
        n_jobs=jobs,
        progress=progress,
    )
    if outcome.failure is not None:
        _fail(outcome.failure, ranks, groups, steps)
    for what, n in sorted(outcome.tally.items()):
        click.echo(f"  {n:12,d}  {what}")
    click.echo(str(outcome))


def replay_command(seed: int, ranks: int | None, groups: bool | None, n_steps: int) -> str:
    """What to type to see a schedule again, step by step."""
    options = f"--schedules 1 --seed {seed}"
    options += "" if ranks is None else f" --ranks {ranks}"
    options += {None: "", True: " --groups", False: " --no-groups"}[groups]
    options += "" if n_steps == N_STEPS else f" --steps {n_steps}"
    return f"python -m {MODULE} {options} --verbose"


def report(failure: ScheduleFailed, ranks: int | None, groups: bool | None, n_steps: int) -> str:
    """A failure for people: its world, its last steps, the invariant, how to replay it."""
    last = failure.trace[1:][-TRACE_LINES:]
    lines = [
        failure.trace[0],
        *(["   …"] if len(failure.trace) > 1 + len(last) else []),
        *last,
        "",
        f"seed {failure.seed}: {failure.reason}",
        f"replay it with: {replay_command(failure.seed, ranks, groups, n_steps)}",
    ]
    return "\n".join(lines)


def _fail(failure: ScheduleFailed, ranks: int | None, groups: bool | None, n_steps: int) -> None:
    click.echo(report(failure, ranks, groups, n_steps), err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
