"""TextStream: the text of an answer, piece by piece as its tokens come."""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns tokens into text that never has to be taken back.

    It holds back tokens that end inside a character, and text that may begin a stop text. The
    pieces together equal what the tokenizer makes of all tokens up to the first stop text.
    """

    def __init__(
        self, tokenizer: Any, stops: tuple[str, ...] = (), *, skip_special: bool = True
    ) -> None:
        """Starts empty.

        Args:
            tokenizer: with ``decode`` as in transformers; None for an engine without text.
            stops: the stop texts.
            skip_special: whether special tokens are left out.
        """
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._stops = stops
        self._ids: list[int] = []
        self._context_at = 0  # tokens from here on are decoded: what a token says depends on others
        self._done_at = 0  # tokens from here on have not become text yet
        self._held = ""

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """Adds a token; returns the text that is final now, and whether a stop text is complete.

        Args:
            token: its id.
            may_stop: False treats a stop text that this token completes as ordinary text.
        """
        self._ids.append(token)
        self._held += self._decoded(is_last=False)
        return self._cut(may_stop=may_stop)

    def finish(self) -> str:
        """The text that was held back, once the last token has been added."""
        text = self._held + self._decoded(is_last=True)
        self._held = ""
        found = self._first_stop(text)
        return text if found is None else text[:found]

    def _decoded(self, *, is_last: bool) -> str:
        """The text of the tokens that have not become text, or nothing while they are incomplete.

        ::

            ids   | … | context | new |       text(context + new) - text(context)
        """
        if self._tokenizer is None or self._done_at == len(self._ids):
            return ""
        before = self._text(self._context_at, self._done_at)
        after = self._text(self._context_at, len(self._ids))
        if after.endswith(_INCOMPLETE) and not is_last:
            return ""
        self._context_at, self._done_at = self._done_at, len(self._ids)
        return after[len(before) :]

    def _text(self, start: int, stop: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:stop],
            skip_special_tokens=self._skip_special,
            clean_up_tokenization_spaces=False,
        )
        return text

    def _cut(self, *, may_stop: bool) -> tuple[str, bool]:
        found = self._first_stop(self._held) if may_stop else None
        if found is not None:
            text, self._held = self._held[:found], ""
            self._done_at = len(self._ids)
            return text, True
        n_kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        at = len(self._held) - n_kept
        text, self._held = self._held[:at], self._held[at:]
        return text, False

    def _first_stop(self, text: str) -> int | None:
        """Where the first stop text begins."""
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        return min(found, default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, but is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
