"""The old path of ``hicache_core.kv.keys``."""

from hicache_core._moved import warn_moved
from hicache_core.kv.keys import *  # noqa: F403

warn_moved(__name__, "hicache_core.kv.keys")
