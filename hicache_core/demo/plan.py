"""The turns of the demo, and which process runs them."""

from __future__ import annotations

from hicache_core.demo.records import TurnPlan
from hicache_core.demo.script import OTHER_QUESTION, QUESTIONS

PROCESSES: tuple[tuple[TurnPlan, ...], ...] = (
    (
        TurnPlan(1, QUESTIONS[0], "", "cold"),
        TurnPlan(2, QUESTIONS[1], "device", "goes on"),
        TurnPlan(3, QUESTIONS[2], "host", "device emptied", flush_device=True),
    ),
    (
        TurnPlan(4, QUESTIONS[3], "storage", "restarted"),
        TurnPlan(5, QUESTIONS[4], "device", "goes on"),
        TurnPlan(6, OTHER_QUESTION, "device", "other user", other_user=True),
    ),
)
"""The turns of the first process, then those of the second."""

CORRUPTED_TURN = 5
"""Before which turn ``--corrupt`` overwrites a page."""

N_STEPS = sum(2 + 2 * len(plans) for plans in PROCESSES)
"""Steps that the processes announce: loading, warming up, and two a turn."""
