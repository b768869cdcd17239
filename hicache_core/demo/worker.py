"""One process of the demo: ``python -m hicache_core.demo.worker SETTINGS HISTORY NUMBER``.

It writes events as lines of JSON to standard output, and the conversation's tokens to the file
HISTORY when it is done; the next process goes on from there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TextIO

import torch

from hicache_core.demo.plan import PROCESSES
from hicache_core.demo.records import DemoSettings, Event, Failure, Note, Step, to_line
from hicache_core.demo.turns import TurnRunner, facts_of, load_model
from hicache_core.errors import HiCacheError


def main(settings_file: Path, history_file: Path, number: int, out: TextIO) -> None:
    """Runs the turns of one process.

    Args:
        settings_file: the ``DemoSettings`` as JSON.
        history_file: token ids of the conversation as JSON; read at the start if it exists, and
            written at the end.
        number: 0 for the first process, 1 for the second.
        out: gets one line for each event.
    """

    def say(event: Event) -> None:
        out.write(to_line(event) + "\n")
        out.flush()

    settings = DemoSettings.from_json(settings_file.read_text())
    history = json.loads(history_file.read_text()) if history_file.exists() else []
    torch.set_num_threads(settings.threads)
    try:
        say(Step(f"process {os.getpid()}: loading the model"))
        loaded = load_model(settings)
        say(facts_of(loaded, settings))
        runner = TurnRunner(loaded, settings, history)
        try:
            say(Step(f"process {os.getpid()}: warming up"))
            runner.warm_up()
            for plan in PROCESSES[number]:
                say(runner.run(plan, say))
            history_file.write_text(json.dumps(runner.history))
        finally:
            runner.close()
        say(Note(f"process {os.getpid()} ends; its device and host tiers are gone"))
    except HiCacheError as error:
        say(Failure(f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error


if __name__ == "__main__":
    # Libraries may print; what they print must not end up between the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), events)
