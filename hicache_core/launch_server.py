"""``python3 -m hicache_core.launch_server``: the same as ``hicache serve``."""

from __future__ import annotations

import sys

from hicache_core.cli.main import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
