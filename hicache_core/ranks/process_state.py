"""The state of another process of this machine: it runs, is stopped, or has ended."""

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
    """A process, identified so that it cannot be confused with another one.

    Attributes:
        host: name of the machine, for messages.
        pid: its process id.
        place: where the pid is valid: boot id of the kernel and pid namespace; empty if unknown.
        started: its start time (field 22 of /proc/PID/stat), since pids are reused.
    """

    host: str
    pid: int
    place: str
    started: str

    @classmethod
    def this(cls) -> Self:
        """The calling process."""
        pid = os.getpid()
        return cls(platform.node(), pid, _place(), _stat(pid)[1])

    @property
    def state(self) -> State:
        """Its state now, as far as this process can see it, in words."""
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
    fields = text.rpartition(")")[2].split()  # its name is in () and may contain anything
    return fields[0], fields[19]
