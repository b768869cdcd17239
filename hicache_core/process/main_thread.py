"""Detects the end of the main thread.

At its end the interpreter waits for all threads except daemons, and a daemon inside torch's code
could crash it. So threads that otherwise only ``close`` ends also check for the end of the main
thread. A script that raises before ``close`` then exits; pending writes may be lost.
"""

from __future__ import annotations

import threading


def main_has_ended() -> bool:
    """Whether the main thread has ended, so that the interpreter is about to exit; cheap."""
    return not threading.main_thread().is_alive()
