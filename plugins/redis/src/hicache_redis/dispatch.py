"""Runs a batch on its servers in parallel."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from hicache_core.errors import BackendError, BackendTimeout, BackendUnavailable
from hicache_core.plugin.backends import Lanes
from hicache_redis.connections import Pool
from hicache_redis.operations import Operation, Redirect, run
from hicache_redis.topology import Share, Topology

_MAX_ASKED = 3
_MAX_ROUNDS = 5  # a slot that is being moved may redirect twice; more is a cluster in disarray


Op = TypeVar("Op", bound=Operation)


class Dispatcher:
    """Sends each key of a batch to the server that has it. Any thread may call any method.

    If a server cannot be reached, its keys are misses as long as another server works. If none
    works, the error is raised; with a single server that is the first error.
    """

    def __init__(self, topology: Topology, lanes: Lanes, retries: int) -> None:
        """Connects to nothing.

        Args:
            topology: the servers, and which keys they have.
            lanes: threads that share a batch.
            retries: maximum number of retries after a lost connection.
        """
        self.topology = topology
        self.counts: Counter[str] = Counter()
        self._lanes = lanes
        self._retries = retries
        self._lock = threading.Lock()

    def count(self, name: str, n: int) -> None:
        """Adds to a counter."""
        with self._lock:
            self.counts[name] += n

    def run(self, operation: Op) -> Op:
        """Runs the operation for every key of the batch, and again for redirected ones.

        Returns:
            The operation, with its answers.

        Raises:
            BackendError: no server works, or one raised an error other than an outage.
        """
        shares = self.topology.shares(operation)
        if sum(len(share.indices) for share in shares) < len(operation.keys):
            self.count("unserved_batches", 1)  # it has slots that no server has
        for _ in range(_MAX_ROUNDS):
            redirects = self._round(operation, shares)
            if not redirects:
                break
            self.count("redirects", len(redirects))
            shares = self.topology.follow(redirects)
        return operation

    def _round(self, operation: Operation, shares: Sequence[Share]) -> list[Redirect]:
        """Runs all shares at once; returns the redirected keys, raises if no server works."""
        if len(shares) == 1:
            came = [self._attempts(operation, shares[0])]
        else:
            parts = [range(n, n + 1) for n in range(len(shares))]
            came = self._lanes.run(lambda part: self._attempts(operation, shares[part[0]]), parts)
        errors = {
            share.pool: result
            for share, result in zip(shares, came, strict=True)
            if isinstance(result, BackendError)
        }
        if errors:
            for error in errors.values():
                if not isinstance(error, (BackendUnavailable, BackendTimeout)):
                    raise error
            if not self._another_works({share.pool for share in shares}, set(errors)):
                raise next(iter(errors.values()))
            self.count("shard_failures", len(errors))
        return [r for result in came if not isinstance(result, BackendError) for r in result]

    def _another_works(self, asked: set[Pool], failed: set[Pool]) -> bool:
        """Returns whether any other server works; tries a few of those not used so far."""
        if asked != failed:
            return True
        others = [pool for pool in self.topology.pools() if pool not in asked]
        return any(map(_answers, random.sample(others, min(len(others), _MAX_ASKED))))

    def _attempts(self, operation: Operation, share: Share) -> list[Redirect] | BackendError:
        """Runs a share; retries after a lost connection up to the limit of the settings.

        What was answered with yes is not asked again.
        """
        for attempt in range(self._retries + 1):
            result = self._attempt(operation, share)
            if not isinstance(result, BackendUnavailable) or attempt == self._retries:
                break
            self.count("retries", 1)
            left = [n for n in share.indices if not operation.answers[n]]
            share = replace(share, indices=left)
        return result

    def _attempt(self, operation: Operation, share: Share) -> list[Redirect] | BackendError:
        pool = share.pool
        try:
            with pool.lease(operation.verb) as wire:
                return run(wire, pool.server, operation, share.indices, asking=share.asking)
        except BackendError as error:
            self.topology.failed(pool)
            return error


def _answers(pool: Pool) -> bool:
    """Returns whether the server answers at all."""
    try:
        with pool.lease("answer") as wire:
            wire.call(b"PING")
    except BackendError:
        return False
    return True
