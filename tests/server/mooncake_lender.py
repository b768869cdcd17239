"""``python -m tests.server.mooncake_lender ADDRESS NBYTES``: lends memory to a master.

It says ``ready``, and goes when its stdin ends.
"""

from __future__ import annotations

import os
import sys

from hicache_mooncake import MooncakeBackend, MooncakeConfig

from hicache_core.types import BackendContext


def main() -> None:
    """Lends until nobody needs it any more."""
    address, nbytes = sys.argv[1:]
    config = MooncakeConfig(master_server_address=address, global_segment_size=int(nbytes))
    backend = MooncakeBackend(config, BackendContext("0" * 16))
    backend.open()
    print("ready", flush=True)
    sys.stdin.read()
    backend.close()
    os._exit(0)  # threads of the client may crash an orderly exit


if __name__ == "__main__":
    main()
