"""``python -m hicache_core``: the same as the command ``hicache``."""

from __future__ import annotations

from hicache_core.cli.main import main

if __name__ == "__main__":
    main()
