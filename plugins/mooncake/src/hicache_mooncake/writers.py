"""Other processes that are writing the same objects."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hicache_mooncake.client import Store
from hicache_mooncake.errors import NOT_READY, OK

POLL_S = 0.002


def n_settled(store: Store, keys: Sequence[str], wait_s: float) -> int:
    """How many leading keys nobody is writing; those of others are waited for, up to ``wait_s``.

    Mooncake's client calls an object stored whose key was taken, also while another process still
    writes it. That takes some milliseconds, unless the writer died: then the master gives the key
    back after ``--put_start_discard_timeout_sec``. The start of a read tells the two from a whole
    object and from none, in one question, and leases only what is there already.
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
