"""The old path of ``hicache_core.config.redact``."""

from hicache_core._moved import warn_moved
from hicache_core.config.redact import *  # noqa: F403

warn_moved(__name__, "hicache_core.config.redact")
