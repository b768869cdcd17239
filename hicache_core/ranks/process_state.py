"""What became of another process of this machine: it runs, is stopped, or is gone."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

State = Literal["runs", "is stopped", "is gone", "is on another machine"]

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, named so that no other one is taken for it.

    Attributes:
        host: name of the machine, for people.
        pid: its number.
        place: where that number means something: the boot of a kernel and a pid namespace; empty
            where the system does not say.
        started: when it started, since numbers are used again (field 22 of /proc/PID/stat).
    """

    host: str
    pid: int
    place: str
    started: str

    @classmethod
    def this(cls) -> Self:
        """The process that asks."""
        pid = os.getpid()
        return cls(platform.node(), pid, _place(), _stat(pid)[1])

    @property
    def state(self) -> State:
        """What it does now, as far as can be seen from this process."""
        if not self.place or self.place != _place():
            return "is on another machine"
        letter, started = _stat(self.pid)
        if started != self.started or letter in "ZX":
            return "is gone"
        return "is stopped" if letter in "Tt" else "runs"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _place() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str]:
    """The state's letter and the start time; Z and nothing for a process that is not there."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return "Z", ""
    fields = text.rpartition(")")[2].split()  # its name stands in () and may hold anything
    return fields[0], fields[19]
