"""TensorRanks: the ranks that compute one model together, and decide together on its cache."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch._C._distributed_c10d import AllreduceOptions, BarrierOptions, BroadcastOptions

from hicache_core.ranks.gloo import TorchRankGroup

__all__ = ["TensorRanks"]

MEET_S = 10.0


class TensorRanks(TorchRankGroup):
    """A rank group that also sums tensors over its ranks and distributes decisions of rank 0.

    One thread of each rank calls all methods, in the same order on each rank; this includes the
    collectives of the cache.

    Attributes:
        meet_s: seconds by which an error may come later on one rank than on another.

    Raises:
        RankLost: from every method, as the base's.
    """

    meet_s = MEET_S

    def summed(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts, with the same bits on all of them.

        Args:
            part: of this rank, of the same shape on all; a float32 tensor on the CPU becomes the
                sum, any other is added up in float32 on the CPU and stays.
        """
        total = part.detach().to("cpu", torch.float32).contiguous()
        options = AllreduceOptions()
        options.timeout = timedelta(seconds=self._timeout_s)
        self._enter(lambda group: group.allreduce([total], options))
        return total.to(part.device, part.dtype)

    def first_numbers(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of rank 0; each rank passes the same count."""
        told = torch.tensor(list(numbers), dtype=torch.int64)
        self._broadcast(told)
        return [int(number) for number in told]

    def first_text(self, text: str) -> str:
        """The text of rank 0; the others' argument is ignored."""
        data = text.encode()
        (length,) = self.first_numbers([len(data)])
        if length == 0:
            return ""
        told = torch.zeros(length, dtype=torch.uint8)
        if self.rank == 0:
            told = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._broadcast(told)
        return told.numpy().tobytes().decode()

    def meet(self) -> None:
        """Returns when all ranks are here, having entered as many collectives as this one.

        For a rank that met an error: did all of them? It does not wait long, so that the others,
        who may be inside another collective, soon hear that it is gone.
        """
        options = BarrierOptions()
        options.timeout = timedelta(seconds=min(self._timeout_s, self.meet_s))
        self._enter(lambda group: group.barrier(options))

    def _broadcast(self, told: torch.Tensor) -> None:
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=self._timeout_s)
        self._enter(lambda group: group.broadcast([told], options))
