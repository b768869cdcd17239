"""Agreement between the ranks that share one request: the only collectives in the code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class RankGroup(ABC):
    """The processes that hold parts of the same KV and must make the same decisions.

    Only the owner thread calls it. Every rank enters ``agree_min`` once a ``poll()``, even with
    nothing to report, and ``gather`` when a cache is opened and when ranks exchange texts.

    Both are collectives: every rank makes the same calls in the same order.

    Raises:
        RankLost: another rank died, does not answer or made another call. Every later call raises
            it too; start all ranks again.
    """

    rank: int
    world_size: int
    window: int | None
    """How many numbers one agreement has, always the same; None if any number is allowed."""

    @abstractmethod
    def agree_min(self, values: Sequence[int]) -> list[int]:
        """The element-wise minimum over all ranks.

        Args:
            values: signed 32-bit numbers; exactly ``window`` of them unless that is None.
        """

    @abstractmethod
    def gather(self, text: str) -> list[str]:
        """The text of each rank, by rank; texts may have any length."""


class SingleRank(RankGroup):
    """One process alone: it agrees with itself."""

    rank = 0
    world_size = 1
    window = None

    def agree_min(self, values: Sequence[int]) -> list[int]:
        # docstring inherited
        return list(values)

    def gather(self, text: str) -> list[str]:
        # docstring inherited
        return [text]


def agree_all(ranks: RankGroup, values: Sequence[int]) -> list[int]:
    """``agree_min`` of any number of values, the same number on each rank.

    The values are split and padded to the group's fixed shape, so this may enter several
    collectives, or none if there are no values.
    """
    width = ranks.window or max(1, len(values))
    agreed: list[int] = []
    for at in range(0, len(values), width):
        part = values[at : at + width]
        agreed += ranks.agree_min([*part, *[0] * (width - len(part))])[: len(part)]
    return agreed
