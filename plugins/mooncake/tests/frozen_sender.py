"""``python frozen_sender.py LAYER``: a prefill node that stops behind the promise of a layer.

It prints its address. A line on stdin lets it promise that layer.
"""

import os
import signal
import sys

from hicache_mooncake.transfer import EngineCarrier, MooncakeTransfer, MooncakeTransferConfig

from hicache_core.kv_transfer.base import TransferContext
from hicache_core.testing.transfer_kit import N_LAYERS, ROOM, WAIT_S, memory_of, spec_of

_send_rows = EngineCarrier.send_rows


def _promise_and_stop(self, peer, frame, segments):
    last = frame.layer == int(sys.argv[1])
    if last:
        sys.stdin.readline()
    _send_rows(self, peer, frame, segments)
    if last:
        os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    """Ends when it is killed."""
    EngineCarrier.send_rows = _promise_and_stop  # type: ignore[method-assign]
    backend = MooncakeTransfer(MooncakeTransferConfig(), TransferContext(memory_of(spec_of(), 1)))
    backend.open()
    backend.offer(ROOM, 8, WAIT_S)
    for layer in range(N_LAYERS):
        backend.send(ROOM, [0, 1], layer, 0, 8)
    print(backend.address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
