"""Agreement between the ranks that share one request: the only collective in the code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class RankGroup(ABC):
    """The processes that hold parts of the same KV and must decide alike.

    Called by the owner thread only, once a ``poll()``, by every rank, whatever it has to report.
    """

    rank: int
    world_size: int
    window: int | None
    """How many jobs one agreement covers: a fixed shape; None where no shape is needed."""

    @abstractmethod
    def agree_min(self, values: Sequence[int]) -> list[int]:
        """The element-wise minimum over all ranks.

        Args:
            values: one number a job, ordered by job id; exactly ``window`` of them unless None.
        """


class SingleRank(RankGroup):
    """One process alone: it agrees with itself."""

    rank = 0
    world_size = 1
    window = None

    def agree_min(self, values: Sequence[int]) -> list[int]:
        # docstring inherited
        return list(values)
