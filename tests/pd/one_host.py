"""``python -m tests.pd.one_host prefill BACKEND``, or ``decode BACKEND HOST PORT``: a host of two.

The backend is the one of a server with ``--host 0.0.0.0``. The prefill host prints its port, then
offers a few rows until stdin ends. The decode host fetches them and prints what it got, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading

from hicache_core.config.settings import HiCacheConfig
from hicache_core.kv_transfer.base import TransferContext
from hicache_core.plugin.manager import transfer_backend_class, transfer_settings
from hicache_core.server.role import role_of
from hicache_core.server.settings import ServerSettings
from hicache_core.testing.transfer_kit import ROOM, WAIT_S, Node, memory_of, spec_of

N_TOKENS, PAGES = 6, (0, 1)


def _node(mode: str, backend: str) -> Node:
    settings = ServerSettings(model_path="none", cache=HiCacheConfig(), host="0.0.0.0")
    apart = dataclasses.replace(settings.disaggregation, mode=mode, transfer_backend=backend)
    role = role_of(dataclasses.replace(settings, disaggregation=apart))
    assert role is not None
    kind, news = transfer_backend_class(backend), threading.Event()
    memory = memory_of(spec_of(), 1 if mode == "prefill" else None)
    config = transfer_settings(kind, role.settings.transfer_settings or {})
    transfer = kind(config, TransferContext(memory, on_notice=news.set))
    transfer.open()
    return Node(memory, transfer, news)


def main() -> None:
    """Plays one host."""
    mode, backend, *address = sys.argv[1:]
    node = _node(mode, backend)
    if mode == "prefill":
        print(node.backend.address.rpartition(":")[2], flush=True)
        node.backend.offer(ROOM, N_TOKENS, WAIT_S)
        node.send_all(PAGES, N_TOKENS)
        sys.stdin.read()
    else:
        node.backend.receive(ROOM, [":".join(address)], PAGES, (0, N_TOKENS), WAIT_S)
        notice = node.notice()
        same = node.rows(PAGES, 0, N_TOKENS) == Node(
            memory_of(spec_of(), 1), node.backend, node.news
        ).rows(PAGES, 0, N_TOKENS)
        print(json.dumps({"state": notice.state.value, "error": notice.error, "same": same}))
    sys.stdout.flush()
    node.backend.close()
    os._exit(0)  # threads of Mooncake's engine may crash an orderly exit


if __name__ == "__main__":
    main()
