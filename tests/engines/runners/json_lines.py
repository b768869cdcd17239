"""What the runners have in common: commands and answers are lines of JSON, one answer a command.

Engines and the processes they start print to stdout. So a runner keeps the pipes of the test for
itself, and all printing goes to stderr, which is the log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

Commands = Mapping[str, Callable[..., Any]]


def serve(start: Callable[[], Commands]) -> None:
    """Starts an engine and works on command until stdin ends.

    A line ``{"do": name, …}`` calls that command with the other values as named arguments. What it
    returns is the answer. An error ends the runner; its traceback is in the log.

    Args:
        start: starts the engine and says what it can be told.
    """
    commands_in = os.fdopen(os.dup(0))  # such a copy is not handed on to child processes
    answers_out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    commands = start()
    answers_out.write('"ready"\n')
    for line in commands_in:
        named = json.loads(line)
        answers_out.write(json.dumps(commands[named.pop("do")](**named)) + "\n")
