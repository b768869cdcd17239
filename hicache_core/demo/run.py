"""Starts the demo's processes one after the other and collects what they report."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hicache_core.demo.plan import PROCESSES
from hicache_core.demo.records import (
    DemoSettings,
    Event,
    Facts,
    Failure,
    Note,
    Outcome,
    TurnRecord,
    from_line,
)
from hicache_core.errors import HiCacheError

# Nothing is downloaded, and the model loader's own progress bars stay away.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


class DemoFailed(HiCacheError):
    """A process of the demo ended before its turns were done."""


def run_demo(settings: DemoSettings, on_event: Callable[[Event], None]) -> Outcome:
    """Runs all turns, in two processes of which the second starts when the first has ended.

    Args:
        settings: for both.
        on_event: called for each event, as it happens, on this thread.

    Raises:
        DemoFailed: a process could not go on; the message says why.
    """
    outcome = Outcome(settings)
    started_at = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hicache-demo-") as folder:
        settings_file = Path(folder, "settings.json")
        settings_file.write_text(settings.to_json())
        for number in range(len(PROCESSES)):
            arguments = [str(settings_file), str(Path(folder, "history.json")), str(number)]
            for event in _events(arguments, Path(folder, f"stderr-{number}.txt")):
                _collect(event, outcome)
                on_event(event)
    outcome.elapsed_s = time.perf_counter() - started_at
    return outcome


def _collect(event: Event, outcome: Outcome) -> None:
    match event:
        case TurnRecord():
            outcome.turns.append(event)
        case Facts():
            outcome.facts.append(event)
        case Note():
            outcome.notes.append(event.text)
        case Failure():
            raise DemoFailed(event.text)


def _events(arguments: list[str], stderr_file: Path) -> Iterator[Event]:
    """Events of a process until it ends.

    Raises:
        DemoFailed: it ended with an error; the last lines that it wrote say which.
    """
    with stderr_file.open("w") as stderr, _worker(arguments, stderr.fileno()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield from_line(line)
        status = process.wait()
    if status:
        tail = "\n".join(stderr_file.read_text(errors="replace").splitlines()[-15:])
        raise DemoFailed(f"a process of the demo ended with status {status}:\n{tail}")


@contextmanager
def _worker(arguments: list[str], stderr: int) -> Iterator[subprocess.Popen[str]]:
    """A process of the demo; it does not outlive the with statement."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hicache_core.demo.worker", *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **_ENVIRONMENT},
    )
    try:
        with process:
            try:
                yield process
            except BaseException:
                process.kill()
                raise
    finally:
        process.wait()
