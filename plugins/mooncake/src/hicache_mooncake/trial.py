"""A trial set-up in a process that can be killed: ``python trial.py``, arguments on stdin.

Mooncake's ``setup`` blocks for minutes and holds the interpreter's lock when the master's port is
open but does not answer. The parent runs this file by its path, so that only Mooncake is imported.
Prints one JSON object: ``{"code": 0}`` or ``{"error": "…"}``.
"""

import json
import os
import sys


def main() -> None:
    """Sets up a client without memory of its own, prints the result and exits at once."""
    arguments = json.load(sys.stdin)
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        answer = {"error": str(error)}
    else:
        store = MooncakeDistributedStore()
        answer = {"code": store.setup(*arguments["args"], **arguments["kwargs"])}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the client's threads may crash an orderly exit


if __name__ == "__main__":
    main()
