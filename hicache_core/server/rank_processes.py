"""RankProcesses: the processes that compute one served model together."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
from torch._C._distributed_c10d import TCPStore

from hicache_core.engine.model import LoadedModel
from hicache_core.engine.shard import check_split
from hicache_core.engine.tensor_ranks import TensorRanks
from hicache_core.errors import ConfigError, HiCacheError, RankLost
from hicache_core.server.models import load_model
from hicache_core.server.role import make_engine, role_of
from hicache_core.server.settings import ServerSettings

log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_LOOK_AGAIN_S = 0.02
_MEET_S = timedelta(seconds=60)
_LOAD_S = timedelta(days=1)
"""However long rank 0 takes to load; when it dies, its sockets close, and nobody waits."""

_GO = "go"


class RankProcesses:
    """Ranks 1 to n-1 of a server, each a process; this process is rank 0.

    They end by themselves when rank 0's engine is closed, and when this process is gone. Whatever
    is left of them at the end of the with statement is killed.
    """

    def __init__(self, settings: ServerSettings, device: str) -> None:
        """Starts nothing; with one rank there is nothing to start.

        Args:
            settings: of the server.
            device: ``cpu`` or ``cuda``.

        Raises:
            ConfigError: the machine has fewer GPUs than ranks.
        """
        if device == "cuda" and torch.cuda.device_count() < settings.tp:
            raise ConfigError(
                f"--tp is {settings.tp}, and each rank needs a GPU of its own; this process sees "
                f"{torch.cuda.device_count()} (CUDA_VISIBLE_DEVICES says which)"
            )
        self._settings = settings
        self._device = device
        self._processes: list[Any] = []
        self._store: TCPStore | None = None
        self._ranks: TensorRanks | None = None

    def __enter__(self) -> Self:
        """Starts the processes, which load the model meanwhile."""
        n_ranks = self._settings.tp
        if n_ranks == 1:
            return self
        self._store = TCPStore(
            _HOST, 0, n_ranks, is_master=True, wait_for_workers=False, timeout=_MEET_S
        )
        _share_threads(n_ranks)
        context = multiprocessing.get_context("spawn")
        for rank in range(1, n_ranks):
            process = context.Process(
                target=work,
                args=(rank, self._store.port, self._settings, device_of(self._device, rank)),
                name=f"hicache-rank-{rank}",
                daemon=True,
            )
            process.start()
            self._processes.append(process)
            log.info("rank %d of %d is process %d", rank, n_ranks, process.pid)
        return self

    def meet(self, model: LoadedModel) -> TensorRanks | None:
        """The ranks, once all of them have loaded the model; None for one alone.

        Raises:
            ConfigError: the model cannot be split over them.
            RankLost: a process died; its own last words say why.
        """
        n_ranks = self._settings.tp
        check_split(model.model.config, n_ranks)
        if self._store is None:
            return None
        for rank, process in enumerate(self._processes, start=1):
            while not self._store.check([_ready(rank)]):
                self._check_alive()
                process.join(_LOOK_AGAIN_S)
        self._store.set(_GO, "")
        self._ranks = TensorRanks.create(0, n_ranks, self._store)
        return self._ranks

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for those that drain, unless something went wrong; then none is left."""
        if self._ranks is not None:
            self._ranks.close()
        patience_s = 0.0 if error is not None else self._settings.shutdown_timeout_s
        until_s = time.monotonic() + patience_s
        for process in self._processes:
            process.join(max(0.0, until_s - time.monotonic()))
            if process.is_alive():
                level = logging.WARNING if error is None else logging.INFO
                log.log(level, "%s (process %d) is killed", process.name, process.pid)
                process.kill()
                process.join()

    def _check_alive(self) -> None:
        for process in self._processes:
            if process.exitcode is not None:
                raise RankLost(
                    f"{process.name} (process {process.pid}) ended with status {process.exitcode} "
                    "before the server could start; what it said before tells why"
                )


def device_of(device: str, rank: int) -> str:
    """Where the model of a rank goes: on GPUs, each rank has one.

    Rank 0's is the first, which plain ``cuda`` means in its process.
    """
    return f"cuda:{rank}" if device == "cuda" else device


def work(rank: int, port: int, settings: ServerSettings, device: str) -> None:
    """Runs a rank from start to end, as the main function of its process.

    The process exits with status 1 if the rank fails.

    Args:
        rank: number of this rank, from 1.
        port: of the store of rank 0 through which the ranks meet, on this machine.
        settings: of the server, the same on all ranks.
        device: where torch puts the model, ``cpu`` or ``cuda:1``.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 says when the end has come
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s",
    )
    _share_threads(settings.tp)
    if device != "cpu":
        torch.cuda.set_device(device)  # else pinning memory would take room on the first GPU, too
    try:
        model = load_model(settings.model_path, device, settings.dtype)
        role = role_of(settings, rank)
        engine = make_engine(settings, model, role, _join(rank, port, settings))
        engine.open()
    except HiCacheError as error:
        log.error("rank %d does not start: %s", rank, error)
        sys.exit(1)
    engine.join()
    if engine.status().error:
        sys.exit(1)


def _join(rank: int, port: int, settings: ServerSettings) -> TensorRanks:
    """Meets the others, once all have loaded their model."""
    try:
        store = TCPStore(_HOST, port, settings.tp, is_master=False, timeout=_MEET_S)
        store.set(_ready(rank), "")
        store.wait([_GO], _LOAD_S)
    except RuntimeError as error:
        raise RankLost(f"rank 0 is gone: {error}") from error
    return TensorRanks.create(rank, settings.tp, store)


def _ready(rank: int) -> str:
    return f"ready-{rank}"


def _share_threads(n_ranks: int) -> None:
    """Of the threads that one process alone would have; more than the cores slow all ranks down."""
    torch.set_num_threads(max(1, torch.get_num_threads() // n_ranks))
