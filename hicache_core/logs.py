"""The old path of ``hicache_core.process.logs``."""

from hicache_core._moved import warn_moved
from hicache_core.process.logs import *  # noqa: F403

warn_moved(__name__, "hicache_core.process.logs")
