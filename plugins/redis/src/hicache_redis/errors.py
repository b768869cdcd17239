"""The table that translates error replies and exceptions of redis-py to errors of HiCache."""

from __future__ import annotations

from redis import exceptions

from hicache_core.errors import (
    BackendDenied,
    BackendError,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
)

REPLIES: dict[str, tuple[type[BackendError], str]] = {
    "NOAUTH": (BackendDenied, "set username and password"),
    "WRONGPASS": (BackendDenied, "check username and password"),
    "NOPERM": (BackendDenied, "give this user the rights that the README's ACL line lists"),
    "READONLY": (BackendDenied, "it is a replica; point url at the primary, set sentinels, or only "
                 "read it with read_only"),
    "OOM": (BackendFull, "set maxmemory-policy allkeys-lru, or raise maxmemory"),
    "MISCONF": (BackendFull, "it cannot save to its disk; turn its snapshots off: save ''"),
    "NOREPLICAS": (BackendUnavailable, "it lacks replicas: see min-replicas-to-write"),
    "LOADING": (BackendUnavailable, "it is loading its data set; wait, or turn persistence off"),
    "MASTERDOWN": (BackendUnavailable, "it is a replica without its primary"),
    "CLUSTERDOWN": (BackendUnavailable, "see CLUSTER INFO; cluster-require-full-coverage no keeps "
                    "the other shards serving"),
    "TRYAGAIN": (BackendUnavailable, "its slots are being moved"),
    "BUSY": (BackendUnavailable, "a script blocks it"),
    "MOVED": (BackendUnavailable, "it belongs to a cluster; set cluster to true"),
    "ASK": (BackendUnavailable, "it belongs to a cluster; set cluster to true"),
}  # fmt: skip
"""First word of an error reply -> our error, and what to do."""

MISSES = frozenset(["WRONGTYPE"])
"""Replies to a read that are a miss: another program uses the key."""

DROPS = frozenset(code for code, (kind, _) in REPLIES.items() if kind is BackendFull)
"""Replies to a write that mean that the object was dropped."""

# The first that matches; other exceptions become a BackendError.
EXCEPTIONS: tuple[tuple[type[Exception], type[BackendError], str], ...] = (
    (exceptions.AuthenticationError, BackendDenied, "check username and password"),
    (exceptions.AuthorizationError, BackendDenied, "give this user the rights of the README"),
    (exceptions.NoPermissionError, BackendDenied, "give this user the rights of the README"),
    (exceptions.MaxConnectionsError, BackendUnavailable, "raise maxclients"),
    (exceptions.TimeoutError, BackendTimeout, "see whether it runs, or raise the timeouts"),
    (exceptions.ConnectionError, BackendUnavailable, "see whether it runs, and check url"),
    (TimeoutError, BackendTimeout, "see whether it runs, or raise the timeouts"),
    (OSError, BackendUnavailable, "see whether it runs"),
)


class ErrorReply(str):
    """The text of an error reply: ``OOM command not allowed …``."""

    __slots__ = ()

    @property
    def code(self) -> str:
        """Its first word."""
        return self.partition(" ")[0]


def reply_error(reply: ErrorReply, server: str, action: str) -> BackendError:
    """Returns the error for an error reply.

    Args:
        reply: of the server.
        server: its address, for the message.
        action: what was requested, for the message.
    """
    # A server that does not know a command quotes its arguments, which may be credentials.
    text = reply.partition(", with args")[0]
    kind, advice = REPLIES.get(reply.code, (BackendError, ""))
    if "max number of clients" in text:
        kind, advice = BackendUnavailable, "raise maxclients, or lower max_connections"
    return kind(f"redis {server} refused to {action}: {text}" + (f" ({advice})" if advice else ""))


def failure(error: Exception, server: str, action: str) -> BackendError:
    """Returns the error for an exception of redis-py or of a socket.

    Args:
        error: what was raised.
        server: its address, for the message.
        action: what was requested, for the message.
    """
    if isinstance(error, BackendError):
        return error
    text = str(error).partition(", with args")[0] or type(error).__name__
    if isinstance(error, exceptions.ResponseError) and text.partition(" ")[0] in REPLIES:
        return reply_error(ErrorReply(text), server, action)
    if isinstance(error.__context__, PermissionError):
        return BackendDenied(f"redis {server} could not {action}: {text} (rights of the socket)")
    for cause, kind, advice in EXCEPTIONS:
        if isinstance(error, cause):
            return kind(f"redis {server} could not {action}: {text} ({advice})")
    return BackendError(f"redis {server} could not {action}: {text}")
