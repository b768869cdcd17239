"""The old path of ``hicache_core.ranks.gloo``."""

from hicache_core._moved import warn_moved
from hicache_core.ranks.gloo import *  # noqa: F403

warn_moved(__name__, "hicache_core.ranks.gloo")
