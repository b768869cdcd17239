"""The only place that picks concrete classes from a configuration."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hicache_core.build.backends import backend_from
from hicache_core.build.observers import Observers
from hicache_core.build.storage import StorageOpener
from hicache_core.config.settings import HiCacheConfig
from hicache_core.config.sources import EXTRA
from hicache_core.controller.controller import Controller
from hicache_core.controller.explain import Explanation
from hicache_core.controller.jobs import JobTable
from hicache_core.controller.parts import Clock, GroupParts, Parts
from hicache_core.controller.policies import (
    BestEffort,
    FreeOnceStored,
    HostRetention,
    KeepOnHost,
    Policies,
    PrefetchPolicy,
    Timeout,
    WaitComplete,
    WriteBack,
    WritePolicy,
    WriteThrough,
)
from hicache_core.controller.prefetch_record import Shortfall
from hicache_core.controller.quarantine import Quarantine
from hicache_core.controller.storage_tier import StorageTier
from hicache_core.controller.warming import Warming
from hicache_core.copies.base import Transfer
from hicache_core.copies.open import open_transfer
from hicache_core.errors import ConfigError, RankLost, SpecError
from hicache_core.kv.keys import TOKEN_NBYTES, pack_tokens, storage_namespace
from hicache_core.kv.spec import GroupKind, KVSpec
from hicache_core.observe.snapshot import CacheSnapshot
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from hicache_core.pools.limits import host_pages
from hicache_core.pools.pins import PinnedUnits
from hicache_core.radix.eviction import eviction_policy
from hicache_core.radix.holdings import Holdings
from hicache_core.radix.picture import TreePicture, take_picture
from hicache_core.radix.tree import RadixTree
from hicache_core.ranks.base import RankGroup, SingleRank, agree_all
from hicache_core.types import Namespace

__all__ = ["HiCache", "backend_from", "prefetch_policy"]

log = logging.getLogger(__name__)

GB = 1e9


WRITE_POLICIES: dict[str, WritePolicy] = {
    "write_through": WriteThrough(threshold=1),
    "write_through_selective": WriteThrough(threshold=2),
    "write_back": WriteBack(),
}

RETENTIONS: dict[str, HostRetention] = {
    "keep": KeepOnHost(),
    "free_once_stored": FreeOnceStored(),
}


def prefetch_policy(config: HiCacheConfig) -> PrefetchPolicy:
    """The policy that the configuration names, with its times."""
    keys = config.controller_keys
    policies: dict[str, PrefetchPolicy] = {
        "best_effort": BestEffort(),
        "wait_complete": WaitComplete(),
        "timeout": Timeout(keys.prefetch_timeout_base, keys.prefetch_timeout_per_ki_token),
    }
    return policies[config.hicache_storage_prefetch_policy]


class HiCache(Controller):
    """A prefix cache of three tiers, made from a configuration. See ``Controller`` for its use::

    with HiCache(config, spec, device_pool) as cache:
        match = cache.match_prefix(tokens)
    """

    def __init__(
        self,
        config: HiCacheConfig,
        spec: KVSpec,
        device_pool: DevicePool,
        *,
        clock: Clock = time.monotonic,
        ranks: RankGroup | None = None,
        batch_pages: int = 128,
    ) -> None:
        """Builds the pools, opens the storage backend and starts the threads.

        Args:
            config: the settings asked for; the compatibility rules are applied here.
            spec: the KV of one token.
            device_pool: L1, over the engine's own tensors or new ones.
            clock: seconds, increasing, for deadlines.
            ranks: the ranks of this cache; None for a single process.
            batch_pages: pages in one storage job at most.

        Raises:
            ConfigError, SpecError, NotEnoughMemory, PluginError, BackendError: the cache cannot be
                opened; nothing is left running.
        """
        in_force = config.resolve().in_force
        ranks = ranks or SingleRank()
        _check_alike(ranks, in_force, batch_pages)
        n_host = _agreed_pages(in_force, spec, device_pool, ranks)
        namespace = storage_namespace(
            spec.identity(), in_force.page_size, in_force.hicache_mem_layout
        )
        holders = ranks.gather(namespace)
        with contextlib.ExitStack() as undo:
            with _together(ranks):
                parts = _parts(in_force, device_pool, n_host, ranks, undo)
                parts = replace(parts, clock=clock, batch_pages=batch_pages)
                if parts.host is not None:
                    hosts = [group.host for group in parts.groups if group.host is not None]
                    opener = StorageOpener(in_force, parts.host, ranks, holders, clock, hosts)
                    parts = _with_storage(parts, in_force, opener, undo)
                observers = Observers(in_force, clock, ranks.rank)
                undo.callback(observers.close)
                observers.open()
            _log_snapshots(in_force, spec)
            super().__init__(observers.watching(parts))
            self._observers = observers
            observers.begin(self)  # the cache is whole: nobody could see it before
            undo.pop_all()

    def poll(self) -> None:
        # docstring inherited
        super().poll()
        self._observers.polled(self._parts.tree)

    def picture(self) -> TreePicture:
        """The largest and the most used nodes of the tree, as counts. Owner thread."""
        self.owner.check()
        return take_picture(self._parts.tree)

    @property
    def status_url(self) -> str | None:
        """Where the status server answers, such as ``http://127.0.0.1:9477``; None without one."""
        return self._observers.status_url

    def recent(self, limit: int) -> Sequence[Explanation]:
        """The records of the latest requests, newest first; may be called on any thread."""
        return self._observers.recent(limit)

    def set_policies(self, values: Mapping[str, object]) -> None:
        """Changes the policies that can change while requests run, from the next decision on.

        Owner thread; every rank makes the same call.

        Args:
            values: a configuration. Only ``hicache_write_policy``, the prefetch policy with its
                times, and ``prefetch_threshold`` are used.

        Raises:
            ConfigError: a value is not allowed; nothing has changed.
        """
        self.owner.check()
        config = HiCacheConfig.load(arguments=values)
        policies = self._parts.policies
        policies.write = WRITE_POLICIES[config.hicache_write_policy]
        policies.prefetch = prefetch_policy(config)
        policies.prefetch_threshold = config.controller_keys.prefetch_threshold

    def warm(
        self, request_id: str, tokens: Sequence[int], namespace: Sequence[str | None] = ()
    ) -> Warming:
        """Loads what storage has of a prompt to the host, however long it takes. Returns at once.

        Unlike a prefetch for a request, it does not end by the prefetch policy, and asks for the
        page that ends with the last token, too. Owner thread; every rank makes the same call.

        Args:
            request_id: any unused id; ``finish_prefetch`` takes it, and is to be called once.
            tokens: of the prompt.
            namespace: the values of a ``Namespace``, in the order of its fields.

        Returns:
            Says whether it is ``done``, and why not everything came.

        Raises:
            InvalidTokens: as in ``match_prefix``.
        """
        self.owner.check()
        packed = pack_tokens(tokens) + bytes(TOKEN_NBYTES)  # so that the last page is asked for
        begun = self.prefetch(request_id, packed, Namespace(*namespace))
        if begun and self._prefetch_path is not None:
            return Warming(self._prefetch_path.of(request_id))
        if self.storage_name is None:
            return Warming(None, Shortfall("no_storage", "no storage backend is attached"))
        threshold = self._parts.policies.prefetch_threshold
        limit = f"fewer than prefetch_threshold ({threshold}) tokens are missing"
        return Warming(None, Shortfall("below_threshold", limit))

    def snapshot(self) -> CacheSnapshot:
        # docstring inherited
        return self._observers.complete(super().snapshot())

    def close(self, timeout_s: float = 10.0) -> None:
        # docstring inherited
        super().close(timeout_s)
        if not self.owner.is_forked:
            self._observers.close()


@contextlib.contextmanager
def _together(ranks: RankGroup) -> Iterator[None]:
    """A step of opening that must succeed on every rank; enters one collective.

    Raises:
        RankLost: it succeeded here, and failed on another rank.
    """
    try:
        yield
    except BaseException:
        agree_all(ranks, [0])
        raise
    if agree_all(ranks, [1]) != [1]:
        raise RankLost("another rank could not open its cache; see the error of that rank")


def _check_alike(ranks: RankGroup, config: HiCacheConfig, batch_pages: int) -> None:
    """Checks that all ranks have the settings that they need to decide alike.

    Raises:
        ConfigError: another rank has other settings; the message names the first that differs.
    """
    own = config.model_dump(mode="json", exclude={"hicache_size", "hicache_ratio", EXTRA})
    own |= config.controller_keys.model_dump() | {"batch_pages": batch_pages}
    for rank, text in enumerate(ranks.gather(json.dumps(own))):
        other = json.loads(text)
        for key, value in own.items():
            if other[key] != value:
                raise ConfigError(
                    f"{key} is {value} on rank {ranks.rank} and {other[key]} on rank {rank}: all "
                    "ranks of a cache need the same settings"
                )


def _agreed_pages(
    config: HiCacheConfig, spec: KVSpec, device_pool: DevicePool, ranks: RankGroup
) -> list[int]:
    """Pages of the host pool, then units of each group's: what fits on the rank with least room.

    All are 0 if there is no host tier.

    Raises:
        ConfigError: the device pools of the ranks differ, so that they could not evict alike.
        SpecError: the device pool does not fit the spec, or a rank has no room for a page.
    """
    pools = (device_pool, *device_pool.groups)
    n_host, error = [0] * len(pools), _misfit(config, spec, device_pool)
    if config.enable_hierarchical_cache and error is None:
        try:
            n_host = _host_units(config, pools)
        except SpecError as failed:
            error = failed
    n_device = [pool.n_pages for pool in pools]
    asked = [int(error is None), *n_device, *(-n for n in n_device), *n_host]
    is_well, *agreed = agree_all(ranks, asked)
    least, minus_most, n_agreed = (
        agreed[at : at + len(pools)] for at in range(0, len(agreed), len(pools))
    )
    if error is not None:
        raise error
    if not is_well:
        raise SpecError("the pools of another rank do not fit; see the error of that rank")
    if least != [-most for most in minus_most]:
        raise ConfigError(
            f"rank {ranks.rank} has {n_device[0]} device pages, others have {least[0]} to "
            f"{-minus_most[0]}: all ranks of a cache need device pools of the same size"
        )
    if n_agreed != n_host:
        log.warning(
            "the host pool has %d pages instead of %d: another rank has no room for more",
            n_agreed[0],
            n_host[0],
        )
    return n_agreed


def _host_units(config: HiCacheConfig, pools: Sequence[DevicePool]) -> list[int]:
    """Units of each host pool: so many for each of the device, or a share of the size by bytes.

    Raises:
        SpecError: a pool has room for none.
    """
    nbytes = [pool.spec.page_nbytes(pool.page_size) for pool in pools]
    total = sum(pool.n_pages * size for pool, size in zip(pools, nbytes, strict=True))
    return [
        host_pages(
            ratio=config.hicache_ratio if size else max(config.hicache_ratio, 1.0),
            size_gb=config.hicache_size * pool.n_pages * size / total
            if len(pools) > 1
            else config.hicache_size,
            device_pages=pool.n_pages,
            page_nbytes=size,
        )
        for pool, size in zip(pools, nbytes, strict=True)
    ]


def _misfit(config: HiCacheConfig, spec: KVSpec, device_pool: DevicePool) -> SpecError | None:
    same = (device_pool.spec, device_pool.page_size) == (spec, config.page_size)
    if same and len(device_pool.groups) == len(spec.groups):
        return None
    return SpecError(
        f"the device pool has pages of {device_pool.page_size} tokens of {device_pool.spec}, but "
        f"the cache needs pages of {config.page_size} tokens of {spec}"
    )


def _parts(
    config: HiCacheConfig,
    device_pool: DevicePool,
    n_host: Sequence[int],
    ranks: RankGroup,
    undo: contextlib.ExitStack,
) -> Parts:
    """All parts of the cache except storage; ``n_host`` are pages, then units of each group."""
    policies = (
        eviction_policy(config.radix_eviction_policy),
        eviction_policy(config.hicache_host_eviction_policy),
    )
    host, transfer = _host(config, device_pool, n_host[0], undo)
    groups = []
    for group, pool, n_units in zip(
        device_pool.spec.groups, device_pool.groups, n_host[1:], strict=True
    ):
        group_host, group_transfer = _host(config, pool, n_units, undo)
        held = Holdings(
            group,
            config.page_size,
            policies,
            PinnedUnits(pool.allocator),
            None if group_host is None else PinnedUnits(group_host.allocator),
        )
        groups.append(GroupParts(held, pool, group_host, group_transfer))
    return Parts(
        page_size=config.page_size,
        tree=RadixTree(config.page_size, *policies, [group.held for group in groups]),
        device=device_pool,
        host=host,
        transfer=transfer,
        policies=Policies(
            WRITE_POLICIES[config.hicache_write_policy],
            prefetch_policy(config),
            config.controller_keys.prefetch_threshold,
        ),
        jobs=JobTable(ranks),
        storage=None,
        retention=RETENTIONS[config.hicache_host_retention],
        groups=tuple(groups),
    )


def _host(
    config: HiCacheConfig, device_pool: DevicePool, n_pages: int, undo: contextlib.ExitStack
) -> tuple[HostPool | None, Transfer | None]:
    """The host pool behind a device pool and what copies between them; None without a host tier."""
    if not n_pages:
        return None, None
    host = HostPool(
        device_pool.spec,
        device_pool.page_size,
        n_pages,
        LAYOUTS[config.hicache_mem_layout],
        pin=device_pool.device.type == "cuda",
        progress=_log_progress,
    )
    undo.callback(host.close)
    transfer = open_transfer(config.hicache_io_backend, device_pool, host)
    undo.callback(transfer.close)
    return host, transfer


def _log_snapshots(config: HiCacheConfig, spec: KVSpec) -> None:
    """Says what the snapshots of a recurrent state cost."""
    for group in spec.groups:
        if group.kind is GroupKind.STATE:
            nbytes = group.spec.page_nbytes(1)
            log.info(
                "a snapshot of group %s has %d bytes: with state_snapshot_interval %d these are "
                "%.0f bytes for each token of a prompt, besides %d bytes of its KV",
                group.name,
                nbytes,
                config.state_snapshot_interval,
                nbytes / config.state_snapshot_interval,
                spec.token_nbytes + sum(g.spec.token_nbytes for g in spec.groups if g.window),
            )


def _log_progress(done_nbytes: int, all_nbytes: int) -> None:
    """Logs how much of a large host pool has been faulted in."""
    log.info("host pool: %.1f of %.1f GB are ready", done_nbytes / GB, all_nbytes / GB)


def _with_storage(
    parts: Parts, config: HiCacheConfig, opener: StorageOpener, undo: contextlib.ExitStack
) -> Parts:
    """Adds the L3 tier to the parts, with the backend that the configuration names attached."""
    assert parts.host is not None
    quarantine = Quarantine(parts.jobs, parts.host.allocator)
    storage = StorageTier(parts.jobs, quarantine, opener.open)
    if config.hicache_storage_backend is not None:
        storage.open(config.hicache_storage_backend, config.backend_config)
        undo.callback(storage.close, 0.0)
    return replace(parts, storage=storage)
