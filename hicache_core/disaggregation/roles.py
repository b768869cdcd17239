"""Role: what makes an engine the prefill or the decode half of a pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hicache_core.controller.controller import Controller
from hicache_core.disaggregation.agreed import AgreedTransfer
from hicache_core.disaggregation.counted import CountedTransfer
from hicache_core.disaggregation.decode import DecodeConnector
from hicache_core.disaggregation.pool_memory import memory_of_pool
from hicache_core.disaggregation.prefill import Outbox, PrefillConnector
from hicache_core.disaggregation.transfer_counts import TransferCounts
from hicache_core.engine.config import EngineConfig
from hicache_core.engine.runner import Runner
from hicache_core.engine.scheduler import Clock, Scheduler
from hicache_core.engine.tensor_ranks import TensorRanks
from hicache_core.errors import ConfigError
from hicache_core.kv_transfer.base import KvTransferBackend, TransferContext
from hicache_core.kv_transfer.page_memory import PageMemory
from hicache_core.observe.snapshot import TransferStatus
from hicache_core.plugin.manager import transfer_backend_class, transfer_settings

MODES = ("prefill", "decode")
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class RoleSettings:
    """Settings of a role.

    Attributes:
        mode: ``prefill`` or ``decode``.
        transfer_backend: name of an installed transfer backend.
        transfer_settings: of that backend; not shown in a repr, since they may hold a secret.
        timeout_s: the decode node computes a prompt whose KV has not arrived by then.
    """

    mode: str
    transfer_backend: str = "tcp"
    transfer_settings: Mapping[str, object] | None = field(default=None, repr=False)
    timeout_s: float = TIMEOUT_S


class Role:
    """A prefill or decode node.

    The engine gets ``make_scheduler`` and ``moves_groups``, the router the ``address``.
    """

    def __init__(self, settings: RoleSettings) -> None:
        """Loads the transfer backend's class; opens nothing.

        Raises:
            ConfigError: the mode is unknown, or a setting is wrong.
            PluginError: the backend is not installed, or does not load.
        """
        if settings.mode not in MODES:
            raise ConfigError(f"mode {settings.mode!r} is none of: {', '.join(MODES)}")
        self.settings = settings
        self.counts = TransferCounts()
        self._class = transfer_backend_class(settings.transfer_backend)
        self._config = transfer_settings(self._class, settings.transfer_settings or {})
        self._transfer: KvTransferBackend | None = None
        self._counted: CountedTransfer | None = None

    def make_scheduler(
        self,
        cache: Controller,
        runner: Runner,
        config: EngineConfig,
        *,
        n_pages: int,
        clock: Clock,
        ranks: TensorRanks | None = None,
    ) -> Scheduler:
        """Makes a scheduler with this role's connector, and opens the transfer backend.

        With several ranks each has a role of its own, and all of them call this: opening is a
        collective.

        Args:
            cache: as for ``Scheduler``.
            runner: as for ``Scheduler``; the transfer backend moves rows of its pool.
            config: as for ``Scheduler``.
            n_pages: size of the device pool.
            clock: seconds, monotonic.
            ranks: the ranks that compute the model together; None for this process alone.

        Raises:
            TransferError, BrokenBackend: the backend does not open.
            SpecError: the pages are not in host memory.
            RankLost: another rank could not do the same.
        """
        scheduler = Scheduler(cache, runner, config, n_pages=n_pages, clock=clock, ranks=ranks)
        transfer = self._open(memory_of_pool(runner.pool), ranks)
        timeout_s = self.settings.timeout_s
        if self.settings.mode == "prefill":
            outbox = Outbox(transfer, timeout_s, self.counts)
            scheduler.feed.listener = outbox
            scheduler.connector = PrefillConnector(outbox, transfer)
        else:
            scheduler.connector = DecodeConnector(
                scheduler, cache, runner.vocabulary, transfer, timeout_s, self.counts
            )
        return scheduler

    def _open(self, memory: PageMemory, ranks: TensorRanks | None) -> KvTransferBackend:
        """The transfer backend of this rank, with several of them one that ends as theirs do."""
        context = TransferContext(memory)
        if ranks is not None:
            context = TransferContext(memory, ranks.rank, ranks.world_size)
        counted = CountedTransfer(self._class(self._config, context))
        transfer = counted if ranks is None else AgreedTransfer(counted, ranks)
        transfer.open()
        self._transfer, self._counted = transfer, counted
        return transfer

    @property
    def moves_groups(self) -> bool:
        """Whether the transfer backend moves windows and states, too."""
        return self._class.moves_groups

    @property
    def address(self) -> str:
        """Address at which decode nodes fetch KV of this rank; empty before the engine is open."""
        return "" if self._transfer is None else self._transfer.address

    @property
    def fault(self) -> str:
        """Why no decode node can fetch KV from this rank at the moment; empty while they can."""
        return "" if self._transfer is None else self._transfer.fault

    def transfers(self) -> list[TransferStatus]:
        """The transfers of this rank for metrics; empty before the engine is open."""
        return [] if self._counted is None else [self._counted.status()]

    def status(self) -> dict[str, Any]:
        """For people and the router; JSON types."""
        return {
            "disaggregation_mode": self.settings.mode,
            "disaggregation_transfer_backend": self.settings.transfer_backend,
            "disaggregation_transfer_address": self.address,
            "disaggregation": asdict(self.counts),
        }
