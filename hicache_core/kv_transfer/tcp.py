"""The transfer backend ``tcp``: rows go over sockets, from page memory into page memory."""

from __future__ import annotations

import time
from collections.abc import Callable

from hicache_core.kv_transfer.base import TransferContext
from hicache_core.kv_transfer.carrier import InlineCarrier
from hicache_core.kv_transfer.peers import PeerConfig, PeerTransfer


class TcpTransfer(PeerTransfer):
    """KV over plain sockets: no device, no library, no copy on the way into the pages."""

    name = "tcp"

    def __init__(
        self,
        config: PeerConfig,
        context: TransferContext,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # docstring inherited
        super().__init__(config, context, InlineCarrier(), clock)
