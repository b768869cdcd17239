"""The scene: conversations at once on a cluster, and what each turn must have found where."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from hicache_core.types import CachedTokens
from tests.pd.cluster import Cluster

Reference = Callable[[Sequence[int], int], list[int]]
"""(prompt, n_new) → the tokens of a plain model without any cache."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the scene is; all in tokens."""

    vocabulary: int
    page_size: int
    n_conversations: int = 4
    n_turns: int = 2
    n_system: int = 40
    n_user: int = 21
    n_new: int = 14


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation, as it went.

    Attributes:
        conversation: its number.
        turn: its number in the conversation.
        prompt: all tokens before the answer.
        answer: the tokens that came.
        cached: what the prefill node had, by tier.
        prefill: which one that was.
    """

    conversation: int
    turn: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cached: CachedTokens
    prefill: str


@dataclass
class TierModel:
    """Which prefixes are where: a dumb model of the tiers, in whole pages, with room for all."""

    page_size: int
    stored: set[tuple[int, ...]] = field(default_factory=set)
    devices: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)

    def expected(self, turn: Turn, beside: Sequence[Turn]) -> set[CachedTokens]:
        """What a prefill node may find of a prompt.

        The turns ``beside`` it are played at once: what they have loaded or computed by then on the
        same node is on its device, and what they have not comes from storage.
        """
        usable = turn.prompt[:-1]
        known = self.devices.get(turn.prefill, set())
        latest = set(known)
        for other in beside:
            if other is not turn and other.prefill == turn.prefill:
                latest |= self._prefixes(other.prompt)
        storage = self._n_known(usable, self.stored)
        first, last = self._n_known(usable, known), self._n_known(usable, latest)
        return {
            CachedTokens(device=device, storage=max(0, storage - device))
            for device in range(first, last + 1, self.page_size)
        }

    def take(self, turn: Turn) -> None:
        """The turn is over, and what it computed is stored."""
        self.devices.setdefault(turn.prefill, set()).update(self._prefixes(turn.prompt))
        # The answer's last token was never computed.
        self.stored.update(self._prefixes(turn.prompt + turn.answer[:-1]))

    def _prefixes(self, tokens: tuple[int, ...]) -> set[tuple[int, ...]]:
        size = self.page_size
        return {tokens[:stop] for stop in range(size, len(tokens) + 1, size)}

    def _n_known(self, tokens: tuple[int, ...], known: set[tuple[int, ...]]) -> int:
        n = 0
        while n + self.page_size <= len(tokens) and tokens[: n + self.page_size] in known:
            n += self.page_size
        return n


def ids_of(shape: Shape, n: int, seed: str) -> tuple[int, ...]:
    """Random token ids."""
    source = random.Random(seed)
    return tuple(source.randrange(10, shape.vocabulary) for _ in range(n))


def play(
    cluster: Cluster, shape: Shape, between: Callable[[int], None] = lambda turn: None
) -> list[Turn]:
    """All conversations at once, turn by turn; ``between`` is called before each turn."""
    system = ids_of(shape, shape.n_system, "system")
    histories = [system] * shape.n_conversations
    turns: list[Turn] = []
    with ThreadPoolExecutor(shape.n_conversations) as clients:
        for number in range(shape.n_turns):
            between(number)
            prompts = [
                history + ids_of(shape, shape.n_user, f"{conversation}/{number}")
                for conversation, history in enumerate(histories)
            ]
            asked = [
                clients.submit(_ask, cluster, shape, (conversation, number), prompt)
                for conversation, prompt in enumerate(prompts)
            ]
            latest = [future.result() for future in asked]
            turns += latest
            histories = [turn.prompt + turn.answer for turn in latest]
            cluster.settle()
    return turns


def _ask(cluster: Cluster, shape: Shape, number: tuple[int, int], prompt: tuple[int, ...]) -> Turn:
    answer, headers = cluster.generate(prompt, shape.n_new)
    details = answer["meta_info"]["cached_tokens_details"]
    cached = CachedTokens(details["device"], details["host"], details["storage"])
    prefill = headers.get("x-hicache-prefill", "")
    return Turn(*number, prompt, tuple(answer["output_ids"]), cached, prefill)


def check_tokens(turns: Sequence[Turn], reference: Reference) -> None:
    """Every answer is that of a plain model."""
    for turn in turns:
        expected = reference(turn.prompt, len(turn.answer))
        assert list(turn.answer) == expected, (turn.conversation, turn.turn)


def check_hits(turns: Sequence[Turn], shape: Shape) -> None:
    """From the second turn on, every prompt found all that was computed before, where it was."""
    tiers = TierModel(shape.page_size)
    for number in range(shape.n_turns):
        latest = [turn for turn in turns if turn.turn == number]
        if number:
            for turn in latest:
                assert turn.cached in tiers.expected(turn, latest), (turn.conversation, number)
        for turn in latest:
            tiers.take(turn)
