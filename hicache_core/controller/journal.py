"""The old path of ``hicache_core.observe.journal``."""

from hicache_core._moved import warn_moved
from hicache_core.observe.journal import *  # noqa: F403

warn_moved(__name__, "hicache_core.observe.journal")
