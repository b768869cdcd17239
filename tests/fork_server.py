"""The one fork server of a worker: it imports torch and the tests' worlds once.

Each process that tests fork from it costs milliseconds, not seconds.
"""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
# It imports what it was told before its first process, and nothing later: hence one list for all.
CONTEXT.set_forkserver_preload(["tests.engine.tp_world", "tests.models.trial", "tests.ranks.rank"])
