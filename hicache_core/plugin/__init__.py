"""Plugins: the hooks that they implement, how they are found, loaded and checked.

The module that an entry point names needs ``hookimpl`` from here, and nothing else.
"""

from hicache_core.plugin.hookspecs import hookimpl

__all__ = ["hookimpl"]
