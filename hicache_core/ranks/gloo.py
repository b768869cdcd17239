"""Agreement between processes over torch.distributed's gloo."""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self
from urllib.parse import urlsplit

import torch
from torch._C._distributed_c10d import (
    AllgatherOptions,
    FileStore,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
)

from hicache_core.errors import ConfigError, RankLost
from hicache_core.ranks.base import RankGroup
from hicache_core.ranks.process_state import Process

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_WINDOW = 256

_Gloo: Any = ProcessGroupGloo  # torch's stubs lack its options and collectives

_LOOK_AGAIN_S = 0.01
_LOOKS = 50
"""How long to look for a dead rank: a killed process closes its sockets before it disappears."""


class _Work(Protocol):
    def wait(self) -> object: ...


class _Group(Protocol):
    """The part of ``dist.ProcessGroup`` and ``ProcessGroupGloo`` that is used here."""

    def rank(self) -> int: ...
    def size(self) -> int: ...
    def allgather(
        self,
        output_tensors: list[list[torch.Tensor]],
        input_tensors: list[torch.Tensor],
        opts: AllgatherOptions,
    ) -> _Work: ...


class TorchRankGroup(RankGroup):
    """Ranks over a gloo group with CPU tensors.

    An agreement is one all_gather of ``window`` int64 and a minimum over it. That has half the
    steps of gloo's all_reduce, and the number of steps determines the time.

    A rank whose process ends is noticed at once, since its sockets close. A silent rank is noticed
    after ``timeout_s``. Both raise ``RankLost``, which names the ranks of this machine that have
    ended or are stopped. A rank that notices closes its own sockets, so that all others notice.

    Threads: the owner thread only. gloo has two threads of its own, which ``close`` joins.
    """

    def __init__(
        self,
        group: _Group,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        window: int = DEFAULT_WINDOW,
    ) -> None:
        """Connects to the other ranks over ``group``; a collective that all of them enter.

        Args:
            group: a process group with a gloo backend, such as ``dist.new_group(backend="gloo")``;
                nobody else may use it.
            timeout_s: seconds that a rank may be late at most; longer than the longest step.
            window: jobs in one agreement; further jobs wait for the next.

        Raises:
            RankLost: not all of them came in time, or ``group`` is not for CPU tensors.
            ConfigError: the ranks were given different arguments, or a value is not positive.
        """
        if window < 1 or not timeout_s > 0:
            raise ConfigError(f"window {window} and timeout_s {timeout_s} must be positive")
        self.rank, self.world_size = group.rank(), group.size()
        self.window: int = window
        self._group: _Group | None = group
        self._timeout_s = timeout_s
        self._lost = ""
        self._peers: list[Process] = []
        self._options = AllgatherOptions()
        self._options.timeout = timedelta(seconds=timeout_s)
        self._mine = torch.zeros(window, dtype=torch.int64)
        self._table = torch.zeros((self.world_size, window), dtype=torch.int64)
        self._rows = list(self._table.unbind(0))
        self._meet()

    @classmethod
    def create(
        cls,
        rank: int,
        world_size: int,
        store: str | Store,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        window: int = DEFAULT_WINDOW,
        host: str | None = None,
    ) -> Self:
        """Makes a group of its own, independent of the engine's use of torch.distributed.

        Nothing global is set; ``dist.init_process_group`` may be called, but need not be.

        Args:
            rank: number of this process, from 0.
            world_size: number of processes.
            store: where they find each other: ``tcp://HOST:PORT`` (rank 0 listens there),
                ``file:///PATH`` of a file that does not exist yet, or an open store.
            timeout_s: as in the constructor; also the limit for connecting.
            window: as in the constructor.
            host: name or address of the interface where other ranks reach this process. Default:
                the interfaces that GLOO_SOCKET_IFNAME names, or the loopback.

        Raises:
            RankLost: not all ranks came in time.
            ConfigError: as in the constructor, or the address is malformed.
        """
        try:
            opened = _open_store(store, rank, world_size, timeout_s)
            options = _Gloo._Options()
            options._devices = _devices(host)
            options._timeout = timedelta(seconds=timeout_s)
            options._threads = 1
            group: _Group = _Gloo(opened, rank, world_size, options)
        except RuntimeError as error:
            raise RankLost(
                f"rank {rank} of {world_size} did not meet the others over {store} within "
                f"{timeout_s:g} s ({_first_line(error)}); start all ranks together, with the same "
                "address and world size"
            ) from error
        return cls(group, timeout_s=timeout_s, window=window)

    def agree_min(self, values: Sequence[int]) -> list[int]:
        # docstring inherited
        if len(values) != self.window:
            raise ValueError(f"an agreement has {self.window} values; given are {len(values)}")
        self._mine.copy_(torch.frombuffer(array("q", values), dtype=torch.int64))
        self._allgather(self._rows, self._mine)
        return self._table.amin(0).tolist()

    def gather(self, text: str) -> list[str]:
        # docstring inherited
        data = text.encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        self._allgather(sizes, torch.tensor([len(data)]))
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = [torch.zeros_like(padded) for _ in lengths]
        self._allgather(rows, padded)
        return [
            row[:length].numpy().tobytes().decode()
            for row, length in zip(rows, lengths, strict=True)
        ]

    def close(self) -> None:
        """Leaves the group; a second call does nothing. Others that still call get ``RankLost``.

        A group that was passed in is not destroyed; that is up to its owner.
        """
        self._lost = self._lost or f"rank {self.rank} of {self.world_size} has left the group"
        self._group = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _meet(self) -> None:
        """Exchanges process ids and arguments with the other ranks and compares the arguments."""
        mine = {"window": self.window, "timeout_s": self._timeout_s}
        answers = [
            json.loads(text) for text in self.gather(json.dumps([mine, asdict(Process.this())]))
        ]
        self._peers = [Process(**process) for _, process in answers]
        for rank, (theirs, _) in enumerate(answers):
            if theirs != mine:
                self.close()
                raise ConfigError(
                    f"rank {self.rank} was given {mine}, rank {rank} {theirs}: give all ranks "
                    "the same"
                )

    def _allgather(self, rows: list[torch.Tensor], mine: torch.Tensor) -> None:
        self._enter(lambda group: group.allgather([rows], [mine], self._options))

    def _enter(self, collective: Callable[[Any], _Work]) -> None:
        """Enters a collective of the group, and waits for its end."""
        if self._group is None:
            raise RankLost(self._lost)
        start = time.monotonic()
        try:
            collective(self._group).wait()
        except RuntimeError as error:
            self._lose(error, time.monotonic() - start)

    def _lose(self, error: RuntimeError, waited_s: float) -> NoReturn:
        """Leaves the group, so that the others notice too; returns the error to raise."""
        self._group = None
        self._lost = (
            f"rank {self.rank} of {self.world_size} lost the others after {waited_s:.1f} s: "
            f"{self._suspects()} ({_first_line(error)}). Restart all ranks together; if one was "
            f"only late, a timeout_s above {self._timeout_s:g} s gives it more time"
        )
        raise RankLost(self._lost) from error

    def _suspects(self) -> str:
        """The ranks that do not run, in words; waits a moment until one is found."""
        others = [(rank, peer) for rank, peer in enumerate(self._peers) if rank != self.rank]
        for _ in range(_LOOKS):
            states = [(rank, peer, peer.state) for rank, peer in others]
            if found := [it for it in states if it[2] in ("is stopped", "is gone")]:
                return ", ".join(f"rank {rank} ({peer}) {state}" for rank, peer, state in found)
            time.sleep(_LOOK_AGAIN_S)
        return "one of them hangs, failed before it came here, or is cut off; see its log"


def _open_store(store: str | Store, rank: int, world_size: int, timeout_s: float) -> Store:
    if isinstance(store, Store):
        return PrefixStore("hicache", store)
    address = urlsplit(store)
    timeout = timedelta(seconds=timeout_s)
    opened: Store
    if address.scheme == "tcp" and address.hostname and address.port:
        opened = TCPStore(
            address.hostname, address.port, world_size, is_master=rank == 0, timeout=timeout
        )
    elif address.scheme == "file" and address.path:
        opened = FileStore(address.path, world_size)
        opened.set_timeout(timeout)
    else:
        raise ConfigError(
            f"ranks cannot meet at {store!r}; give tcp://HOST:PORT or file:///PATH/OF/A/NEW/FILE"
        )
    return opened


def _devices(host: str | None) -> list[object]:
    """gloo's sockets: on ``host``, on the interfaces that the environment names, or loopback."""
    create = _Gloo.create_device
    names = os.environ.get("GLOO_SOCKET_IFNAME", "") if host is None else ""
    if names:
        return [create(interface=name.strip()) for name in names.split(",")]
    return [create(hostname=host or "127.0.0.1")]


def _first_line(error: BaseException) -> str:
    """The error without gloo's source position and what follows the first sentence."""
    line = (str(error).splitlines() or [""])[0]
    return line.rpartition("] ")[2].partition(". ")[0]
