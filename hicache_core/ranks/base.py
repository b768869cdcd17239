"""Agreement between the ranks that share one request: the only collectives in the code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class RankGroup(ABC):
    """The processes that hold parts of the same KV and must decide alike.

    Called by the owner thread only. ``agree_min`` is entered once a ``poll()`` by every rank,
    whatever it has to report; ``gather`` when a cache is opened, and where ranks have more to say
    than numbers.

    Both are collectives: every rank makes the same calls in the same order.

    Raises:
        RankLost: from both, when another rank died, does not answer or is in another call; and
            from every call after that: there is no way back but to start all ranks again.
    """

    rank: int
    world_size: int
    window: int | None
    """How many numbers one agreement covers: a fixed shape; None where no shape is needed."""

    @abstractmethod
    def agree_min(self, values: Sequence[int]) -> list[int]:
        """The element-wise minimum over all ranks.

        Args:
            values: signed 32-bit numbers; exactly ``window`` of them unless that is None.
        """

    @abstractmethod
    def gather(self, text: str) -> list[str]:
        """What each rank said, by rank: texts of any length."""


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
    """``agree_min`` of any number of values, equally many on each rank; of none, nothing happens.

    They are brought to the group's fixed shape, so that it may take more than one collective.
    """
    width = ranks.window or max(1, len(values))
    agreed: list[int] = []
    for at in range(0, len(values), width):
        part = values[at : at + width]
        agreed += ranks.agree_min([*part, *[0] * (width - len(part))])[: len(part)]
    return agreed
