"""The old path of ``hicache_core.kv_transfer.carrier``."""

from hicache_core._moved import warn_moved
from hicache_core.kv_transfer.carrier import *  # noqa: F403

warn_moved(__name__, "hicache_core.kv_transfer.carrier")
