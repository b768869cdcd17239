"""What one schedule is like from its start: sizes, policies, faults; a function of its seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from hicache_core.kv.spec import Component, Group, GroupKind, KVSpec
from hicache_core.radix.eviction import POLICY_NAMES
from hicache_core.types import Namespace

NAMESPACES = (Namespace(), Namespace(cache_salt="tenant"), Namespace(lora_id="adapter"))

LAYOUTS = ("page_first", "layer_first", "page_first_direct")
WRITE_POLICIES = ("write_through", "write_through", "write_through_selective", "write_back")

FINGERPRINT = "simulated-model"

PrefetchName = Literal["best_effort", "wait_complete", "timeout"]
PREFETCH_POLICIES: tuple[PrefetchName, ...] = (
    "best_effort",
    "wait_complete",
    "wait_complete",
    "timeout",
)


HOST_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 36, 48, 72)
"""Host pools come in few sizes, since schedules use those of earlier ones again."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One small world.

    Attributes:
        ranks: controllers in lockstep.
        is_mla: every rank holds the same bytes, which one of them stores; else each its own head.
        window: numbers of one collective.
        page_size: tokens a page.
        device_pages: pages of each device pool.
        host_pages: pages of each host pool.
        layout: of the host pool.
        write_policy: when pages go down.
        retention: whether the host keeps what storage has.
        device_eviction: policy of the device.
        host_eviction: policy of the host.
        prefetch_policy: how long requests wait for storage.
        prefetch_threshold: tokens that must be missing before storage is asked.
        admission: how much of what storage has is loaded.
        batch_pages: pages of one storage job at most.
        store_objects: cap of the store in objects of one page; none if None.
        n_threads: of each storage worker.
        max_pages_in_flight: bound on reads and on writes, in pages.
        deadline_s: when a storage job is overdue; never, and without a guard, if None.
        two_queues: copies to the host have a queue of their own.
        copy_failure_rate: share of the copy steps that fail.
        starts_with_storage: a store is attached from the start.
        has_full: all pages of a prefix are needed by some layers; always without groups.
        windows: tokens of each group that is a window.
        has_state: a group is a state.
        device_units: units of each group's device pool.
        host_units: units of each group's host pool.
    """

    ranks: int
    is_mla: bool
    window: int | None
    page_size: int
    device_pages: int
    host_pages: int
    layout: str
    write_policy: str
    retention: str
    device_eviction: str
    host_eviction: str
    prefetch_policy: PrefetchName
    prefetch_threshold: int
    admission: str
    batch_pages: int
    store_objects: int | None
    n_threads: int
    max_pages_in_flight: int
    deadline_s: float | None
    two_queues: bool
    copy_failure_rate: float
    starts_with_storage: bool
    has_full: bool
    windows: tuple[int, ...]
    has_state: bool
    device_units: int
    host_units: int

    @classmethod
    def drawn(cls, draw: Random, ranks: int | None, groups: bool | None) -> Setup:
        """A world for ``draw``.

        Args:
            draw: decides the rest.
            ranks: how many; 1, 2 or 4, as drawn, if None.
            groups: whether it has groups of layers; as drawn, if None.
        """
        n_ranks = ranks or draw.choices((1, 2, 4), (80, 15, 5))[0]
        page_size = draw.choice((2, 4))
        device_pages = draw.randint(4, 24)
        world = cls(
            ranks=n_ranks,
            is_mla=draw.random() < 0.3,
            window=draw.choice((8, 8, 16, 16, 64) if n_ranks > 1 else (None, None, 8, 16)),
            page_size=page_size,
            device_pages=device_pages,
            host_pages=_rounded(device_pages * draw.choice((0.3, 0.5, 1.0, 2.0, 3.0))),
            layout=draw.choice(LAYOUTS),
            write_policy=draw.choice(WRITE_POLICIES),
            retention=draw.choice(("keep", "free_once_stored")),
            device_eviction=draw.choice(POLICY_NAMES),
            host_eviction=draw.choice(POLICY_NAMES),
            prefetch_policy=draw.choice(PREFETCH_POLICIES),
            prefetch_threshold=page_size * draw.choice((1, 1, 1, 2)),
            admission=draw.choice(("always", "always", "cost_aware")),
            batch_pages=draw.randint(1, 4),
            store_objects=draw.choice((None, None, 4, 12)),
            n_threads=draw.randint(1, 3),
            max_pages_in_flight=draw.choice((1, 3, 100)),
            deadline_s=draw.choice((None, 0.05, 1.0, 5.0)),
            two_queues=draw.random() < 0.5,
            copy_failure_rate=draw.choice((0.0, 0.0, 0.1, 0.2)),
            starts_with_storage=draw.random() < 0.9,
            has_full=True,
            windows=(),
            has_state=False,
            device_units=1,
            host_units=1,
        )
        wants_groups = draw.random() < 0.6
        return world._with_groups(draw) if (wants_groups and groups is None) or groups else world

    def _with_groups(self, draw: Random) -> Setup:
        """This world with groups of layers."""
        sizes = [2, self.page_size + 1, 3 * self.page_size - 1, 5 * self.page_size]
        n_windows, has_state = draw.choice(
            ((1, False), (1, False), (0, True), (1, True), (2, True))
        )
        windows = draw.sample(sizes, n_windows)
        device_units = draw.choice((2, 4, 8, 8, 12, 16, 24))
        return replace(
            self,
            has_full=draw.random() < 0.7,
            windows=tuple(sorted(windows)),
            has_state=has_state,
            device_units=device_units,
            host_units=_rounded(device_units * draw.choice((0.5, 1.0, 2.0, 2.0, 4.0))),
        )

    def shard(self, rank: int) -> int:
        """Which part of the KV ``rank`` holds; equal numbers mean equal bytes."""
        return 0 if self.is_mla else rank

    def spec(self, rank: int) -> KVSpec:
        """The KV that ``rank`` holds: latents and keys, one head of each layer, or two layers.

        Ranks cannot share the heads of a state, so they share the layers of such a model.
        """
        if self.is_mla:
            latents = KVSpec.mla(
                num_layers=2, kv_lora_rank=3, rope_dim=2, dtype="float16", fingerprint=FINGERPRINT
            )
            keys = Component("indexer_k", (3,), "uint8", (1,))
            return self._grouped(replace(latents, components=(*latents.components, keys)))
        n_stages, n_heads = (self.ranks, 1) if self.has_state else (1, self.ranks)
        whole = KVSpec.mha(
            num_layers=2 * n_stages,
            num_heads=n_heads,
            head_dim=2,
            dtype="float16",
            fingerprint=FINGERPRINT,
        )
        whole = self._grouped(whole)
        if self.has_state:
            return whole.shard(layers=(2 * rank, 2 * rank + 2))
        return whole.shard(heads=(rank, rank + 1))

    def _grouped(self, spec: KVSpec) -> KVSpec:
        """``spec`` with the groups of this world, each of which lives in some of the layers."""
        n_heads, n_layers = spec.heads[1], spec.num_layers
        even, odd = tuple(range(0, n_layers, 2)), tuple(range(1, n_layers, 2))
        window = (Component("k", (n_heads, 3), "float16", odd),)
        state = (
            Component("conv_0", (3,), "float16"),
            Component("recurrent_0", (5,), "uint8", even),
        )
        groups = [
            Group(
                "_".join(["swa", str(i)][: 1 + i]),
                GroupKind.WINDOW,
                replace(spec, components=window),
                size,
            )
            for i, size in enumerate(self.windows)
        ]
        if self.has_state:
            groups.append(Group("mamba", GroupKind.STATE, replace(spec, components=state)))
        components = spec.components if self.has_full else ()
        return replace(spec, components=components, groups=tuple(groups))


def _rounded(n_pages: float) -> int:
    """The largest of ``HOST_SIZES`` that is no larger."""
    return max(size for size in HOST_SIZES if size <= max(n_pages, 1))
