"""When a request stops waiting for storage: one small object a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


class PrefetchPolicy(ABC):
    """Decides, each time the scheduler asks, whether a request goes on without what is missing."""

    @abstractmethod
    def gives_up(self, waited_s: float, n_tokens: int) -> bool:
        """Whether the request stops waiting now.

        Args:
            waited_s: seconds since the scheduler first wanted to run the request.
            n_tokens: tokens that storage was asked for.
        """


@dataclass(frozen=True, slots=True)
class BestEffort(PrefetchPolicy):
    """Takes what has arrived when the scheduler is ready; never waits."""

    def gives_up(self, waited_s: float, n_tokens: int) -> bool:  # noqa: ARG002
        # docstring inherited
        return True


@dataclass(frozen=True, slots=True)
class WaitComplete(PrefetchPolicy):
    """Waits until storage has delivered or failed: the highest reuse."""

    def gives_up(self, waited_s: float, n_tokens: int) -> bool:  # noqa: ARG002
        # docstring inherited
        return False


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

    def gives_up(self, waited_s: float, n_tokens: int) -> bool:
        # docstring inherited
        return waited_s > self.base_s + self.per_ki_token_s * n_tokens / 1024
