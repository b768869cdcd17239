"""Every exception of HiCache, in one tree.

HiCacheError
├── ConfigError (ValueError)            a setting is wrong
├── InvalidTokens (ValueError)          token ids that cannot be keys
├── SpecError (ValueError)              a KV shape, dtype or pool that does not fit the KVSpec
├── NotEnoughMemory (MemoryError)       a pool larger than the machine or its cgroup holds
├── PoolExhausted (MemoryError)         no free page, and nothing left that may be evicted
├── QueueFull (RuntimeError)            the queue of requests is full; try again later
├── UseAfterClose (RuntimeError)        a call after close()
├── WrongThread (RuntimeError)          a call from a thread that does not own the object
├── IntegrityError (AssertionError)     our own bug: an invariant does not hold
├── LoadFailed (RuntimeError)           a copy into device pages failed
├── RankLost (ConnectionError)          another rank died, hangs, or decided otherwise
├── TransferError (ConnectionError)     KV did not get from a prefill node to a decode node
│   └── PeerRefused                     they have different models or protocol versions
├── PluginError                         a backend that cannot be used
│   ├── UnknownBackend (LookupError)    no installed distribution has that name
│   ├── BrokenBackend (ImportError)     it is installed, but its module or class does not load
│   └── IncompatibleBackend (TypeError) it loads, but is not a backend of this api_version
└── BackendError (OSError)              a storage backend's failure, never just a miss
    ├── BackendUnavailable (ConnectionError)   the store cannot be reached, or was lost
    │   └── BreakerOpen                        it failed so often that it is not used for a while
    ├── BackendTimeout (TimeoutError)          the store did not answer in time
    ├── BackendDenied (PermissionError)        credentials or rights are wrong
    ├── BackendFull                            the store has no room: the write was dropped
    └── BackendCorrupt                         the store's answer cannot be its own data
"""

from __future__ import annotations


class HiCacheError(Exception):
    """Base of every error that HiCache raises on purpose."""


class ConfigError(HiCacheError, ValueError):
    """A setting is wrong; the message names the key, the value and what is allowed."""


class InvalidTokens(HiCacheError, ValueError):
    """Token ids that cannot be packed as unsigned 32-bit integers."""


class SpecError(HiCacheError, ValueError):
    """A shape, dtype, page size or pool that does not fit the KVSpec."""


class NotEnoughMemory(HiCacheError, MemoryError):
    """A pool is larger than the memory that the machine or its cgroup has left."""


class PoolExhausted(HiCacheError, MemoryError):
    """No page is free, and no page can be evicted."""


class QueueFull(HiCacheError, RuntimeError):
    """The queue of requests is full; the client may try again later, or another server."""


class UseAfterClose(HiCacheError, RuntimeError):
    """A call on an object that was closed."""


class WrongThread(HiCacheError, RuntimeError):
    """A call from another thread than the owner's, or in a forked child."""


class IntegrityError(HiCacheError, AssertionError):
    """An invariant does not hold: a bug of HiCache itself, please report it."""


class LoadFailed(HiCacheError, RuntimeError):
    """A copy into device pages failed; those pages hold nothing and the request must recompute."""


class RankLost(HiCacheError, ConnectionError):
    """Another rank died or does not answer: the ranks can no longer decide alike."""


class TransferError(HiCacheError, ConnectionError):
    """KV did not get from a prefill node to a decode node: a lost peer, a time-out, bad bytes."""


class PeerRefused(TransferError):
    """The nodes do not fit together: another model, dtype, page size or protocol version."""


class PluginError(HiCacheError):
    """A backend plugin that cannot be used."""


class UnknownBackend(PluginError, LookupError):
    """No installed distribution offers a backend of that name."""


class BrokenBackend(PluginError, ImportError):
    """The backend is installed, but its module or class does not load."""


class IncompatibleBackend(PluginError, TypeError):
    """The class loads, but is not a backend of an api_version that this core supports."""


class BackendError(HiCacheError, OSError):
    """A storage backend failed. A missing key is an answer, not a failure."""


class BackendUnavailable(BackendError, ConnectionError):
    """The store cannot be reached, or the connection to it was lost."""


class BreakerOpen(BackendUnavailable):
    """The circuit breaker is open: the store was not called, so that no request waits for it."""


class BackendTimeout(BackendError, TimeoutError):
    """The store did not answer within the set time."""


class BackendDenied(BackendError, PermissionError):
    """The store refused the credentials, or these credentials may not do this."""


class BackendFull(BackendError):
    """The store has no room left; what was being written was dropped."""


class BackendCorrupt(BackendError):
    """The store answered with something that cannot be its own data."""
