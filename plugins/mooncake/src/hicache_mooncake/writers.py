"""Waiting for other processes that are writing the same objects."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hicache_mooncake.client import Store
from hicache_mooncake.errors import NOT_READY, OK

POLL_S = 0.002


def unsettled(store: Store, keys: Sequence[str], wait_s: float) -> list[int]:
    """Waits up to ``wait_s`` for other writers; returns the indexes of keys that still have one.

    Mooncake's client reports an object as stored when its key is taken, even while another process
    is still writing it. That takes some milliseconds, unless the writer died: then the master frees
    the key after ``--put_start_discard_timeout_sec``. The start of a read shows the state of all
    keys in one request, and leases only complete objects.

    Args:
        store: of the client.
        keys: of the objects.
        wait_s: maximum time to block, in seconds.
    """
    stop_at = time.monotonic() + wait_s
    left = list(range(len(keys)))
    while True:
        codes = store.batch_get_session_start([keys[n] for n in left])
        states = list(zip(left, codes, strict=True))
        whole = [keys[n] for n, code in states if code == OK]
        if whole:
            store.batch_get_session_end(whole)
        waiting = [n for n, code in states if code == NOT_READY]
        if not waiting or time.monotonic() >= stop_at:
            return waiting
        # Absent ones are asked again too: the other process may be about to write them.
        left = [n for n, code in states if code != OK]
        time.sleep(POLL_S)
