"""The old path of ``hicache_core.plugin.hookspecs``."""

from hicache_core._moved import warn_moved
from hicache_core.plugin.hookspecs import *  # noqa: F403

warn_moved(__name__, "hicache_core.plugin.hookspecs")
