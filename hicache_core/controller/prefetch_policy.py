"""When a request stops waiting for storage: one small object a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


class PrefetchPolicy(ABC):
    """Decides how long a request waits for what storage has not delivered."""

    @abstractmethod
    def limit_s(self, n_tokens: int) -> float | None:
        """Seconds that a request waits, from when the scheduler first wanted to run it.

        Args:
            n_tokens: tokens that storage was asked for.

        Returns:
            0 to take what is there at once; None to wait until storage has delivered or failed.
        """


@dataclass(frozen=True, slots=True)
class BestEffort(PrefetchPolicy):
    """Takes what has arrived when the scheduler is ready; never waits."""

    def limit_s(self, n_tokens: int) -> float | None:  # noqa: ARG002
        # docstring inherited
        return 0.0


@dataclass(frozen=True, slots=True)
class WaitComplete(PrefetchPolicy):
    """Waits until storage has delivered or failed: the highest reuse."""

    def limit_s(self, n_tokens: int) -> float | None:  # noqa: ARG002
        # docstring inherited
        return None


@dataclass(frozen=True, slots=True)
class Timeout(PrefetchPolicy):
    """Waits a bounded time that grows with the length asked for.

    The limit is ``base_s + per_ki_token_s * n_tokens / 1024``, as in SGLang 0.5.

    Attributes:
        base_s: seconds that every request may wait.
        per_ki_token_s: seconds added for each 1,024 tokens.
    """

    base_s: float = 1.0
    per_ki_token_s: float = 0.25

    def limit_s(self, n_tokens: int) -> float | None:
        # docstring inherited
        return self.base_s + self.per_ki_token_s * n_tokens / 1024
