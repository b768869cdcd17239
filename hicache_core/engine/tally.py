"""Tally: counts requests by how they ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Tally:
    """What happened since the start; ``EngineStatus`` says what each number means."""

    finished: int = 0
    aborted: int = 0
    failed: int = 0
    preempted: int = 0
    restarted: int = 0
