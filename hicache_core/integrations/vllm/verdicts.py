"""What a store was last known to have, for an engine that asks key by key and never waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

MAX_AGE_S = 5.0
"""A verdict is asked for again after this time: another server may have stored the page."""


@dataclass(slots=True)
class _Verdict:
    """What is known of one key.

    Attributes:
        requests: ids of the requests that asked for it.
        present: whether the store has it; None while that is unknown.
        since_s: when that became known.
        asked: whether a question is on its way.
    """

    requests: set[str] = field(default_factory=set)
    present: bool | None = None
    since_s: float = 0.0
    asked: bool = False


class Verdicts:
    """Remembers answers for the requests that wait for them.

    A key that is not known becomes a question; ``take_questions`` hands out all questions at once.
    What a read or write has shown overrules an answer that is still on its way, so that a damaged
    page is not read again and again for the same request.

    Threads: the owner's only.
    """

    def __init__(self, clock: Callable[[], float], max_age_s: float = MAX_AGE_S) -> None:
        self._clock = clock
        self._max_age_s = max_age_s
        self._verdicts: dict[bytes, _Verdict] = {}
        self._keys: dict[str, set[bytes]] = {}  # of each request
        self._unasked: list[bytes] = []

    def __len__(self) -> int:
        return len(self._verdicts)

    def look(self, key: bytes, request_id: str) -> bool | None:
        """Returns whether the store has a page, or None: it will be asked.

        Args:
            key: the engine's.
            request_id: of the request that asks; the verdict is kept until it is forgotten.
        """
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = _Verdict()
            self._unasked.append(key)
        elif verdict.present is not None and self._clock() - verdict.since_s > self._max_age_s:
            verdict.present = None
            if not verdict.asked:
                self._unasked.append(key)
        if request_id not in verdict.requests:
            verdict.requests.add(request_id)
            self._keys.setdefault(request_id, set()).add(key)
        return verdict.present

    def take_questions(self) -> list[bytes]:
        """Returns the keys to ask the store for; each is returned once."""
        keys = []
        for key in self._unasked:
            verdict = self._verdicts.get(key)
            if verdict is not None and verdict.present is None and not verdict.asked:
                verdict.asked = True
                keys.append(key)
        self._unasked.clear()
        return keys

    def answer(self, keys: Sequence[bytes], mask: Sequence[bool]) -> None:
        """Notes the store's answer to a question.

        Args:
            keys: from ``take_questions``.
            mask: for each key whether the store has it.
        """
        now = self._clock()
        for key, present in zip(keys, mask, strict=True):
            verdict = self._verdicts[key]
            verdict.asked = False
            if not verdict.requests:
                del self._verdicts[key]
            elif verdict.present is None:
                verdict.present, verdict.since_s = present, now

    def note(self, keys: Iterable[bytes], *, present: bool) -> None:
        """Notes what a read or a write has shown, for the keys that a request asked for."""
        now = self._clock()
        for key in keys:
            verdict = self._verdicts.get(key)
            if verdict is not None:
                verdict.present, verdict.since_s = present, now

    def forget(self, request_id: str) -> None:
        """Drops the verdicts that no other request asked for."""
        for key in self._keys.pop(request_id, ()):
            verdict = self._verdicts[key]
            verdict.requests.discard(request_id)
            if not verdict.requests and not verdict.asked:
                del self._verdicts[key]
