"""Several ranks as processes, driven together; whatever hangs is killed and fails the test."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.fork_server import CONTEXT
from tests.ranks.rank import serve

HARD_TIMEOUT_S = 60.0
"""Longer than anything here takes on a machine that is busy with other things."""


class RankFailed(Exception):
    """A rank's command raised; the text says what."""


class Fleet:
    """``n_ranks`` processes that are one group."""

    def __init__(
        self,
        n_ranks: int,
        directory: Path,
        *,
        timeout_s: float = 30.0,
        group_args: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """Starts them; they meet over a file in ``directory``.

        Args:
            n_ranks: how many.
            directory: an empty one.
            timeout_s: of the group.
            group_args: more arguments of the group, for each rank.
        """
        store = f"file://{directory / 'meeting'}"
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(n_ranks):
            ours, theirs = CONTEXT.Pipe()
            extra = group_args[rank] if group_args else {}
            process = CONTEXT.Process(
                target=serve, args=(theirs, rank, n_ranks, store, timeout_s, extra)
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    @property
    def ranks(self) -> list[int]:
        """All ranks that live."""
        return [rank for rank, process in enumerate(self.processes) if process.is_alive()]

    def meet(self) -> None:
        """Waits until they have met."""
        self.receive(self.ranks)

    def send(self, rank: int, command: str, *args: Any, **kwargs: Any) -> None:
        self.pipes[rank].send((command, args, kwargs))

    def receive(self, ranks: Sequence[int]) -> list[Any]:
        """One answer of each; all are awaited before the first failure is raised."""
        deadline = time.monotonic() + HARD_TIMEOUT_S
        answers, failures = [], []
        for rank in ranks:
            if not self.pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                failures.append(f"rank {rank} does not answer")
                self.kill(rank)
                continue
            try:
                good, answer = self.pipes[rank].recv()
            except EOFError:
                good, answer = False, "its process ended"
            if good:
                answers.append(answer)
            else:
                failures.append(f"rank {rank}: {answer}")
        if failures:
            raise RankFailed("\n".join(failures))
        return answers

    def all(self, command: str, *args: Any, **kwargs: Any) -> list[Any]:
        """The same command to all that live; their answers by rank."""
        ranks = self.ranks
        for rank in ranks:
            self.send(rank, command, *args, **kwargs)
        return self.receive(ranks)

    def same(self, command: str, *args: Any, **kwargs: Any) -> Any:
        """As ``all``, and all ranks must give the same answer, which is returned."""
        answers = self.all(command, *args, **kwargs)
        assert all(answer == answers[0] for answer in answers), answers
        return answers[0]

    def each(self, command: str, *args: Any, by_rank: dict[int, Any], **kwargs: Any) -> list[Any]:
        """As ``all``, with further keyword arguments for some ranks."""
        ranks = self.ranks
        for rank in ranks:
            self.send(rank, command, *args, **kwargs | by_rank.get(rank, {}))
        return self.receive(ranks)

    def kill(self, rank: int) -> None:
        self.processes[rank].kill()
        self.processes[rank].join()

    def freeze(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGSTOP)

    def thaw(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10.0 if error is None else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
