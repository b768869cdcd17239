"""The end of the main thread, which threads of ours look for.

An interpreter waits at its end for all threads but daemons, and no daemon may be in the middle of
torch's code then. So a thread that only ``close`` would end looks at this as well, and a script
that raises before ``close`` exits. What was to be written by then is not promised.
"""

from __future__ import annotations

import threading


def main_has_ended() -> bool:
    """Whether the interpreter is on its way to its end; costs a look."""
    return not threading.main_thread().is_alive()
