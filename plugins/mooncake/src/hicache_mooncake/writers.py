"""Waiting for other processes that are writing the same objects."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hicache_mooncake.client import Store
from hicache_mooncake.errors import NOT_READY, OK

POLL_S = 0.002


def n_settled(store: Store, keys: Sequence[str], wait_s: float) -> int:
    """Waits up to ``wait_s`` for other writers; returns how many leading keys have none.

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
    n = 0
    while True:
        left = list(keys[n:])
        codes = store.batch_get_session_start(left)
        whole = [key for key, code in zip(left, codes, strict=True) if code == OK]
        if whole:
            store.batch_get_session_end(whole)
        if NOT_READY not in codes:
            return len(keys)
        n += codes.index(NOT_READY)
        if time.monotonic() >= stop_at:
            return n
        time.sleep(POLL_S)
