"""Log probabilities in the forms of SGLang and OpenAI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from hicache_core.engine.request import TokenLogprobs
from hicache_core.server.bridge import FullAnswer

LEAST = -9999.0
"""What is told of a token that cannot come: JSON knows no infinity."""

_ORDINARY = "a"


class TokenTexts:
    """The text of each token by itself. Event loop only."""

    def __init__(self, tokenizer: Any) -> None:
        """Decodes nothing yet; ``tokenizer`` is transformers'."""
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, token: int) -> str:
        """The text of a token inside a text; U+FFFD where it is a part of a character."""
        text = self._known.get(token)
        if text is None:
            text = self._known[token] = self._decoded(token)
        return text

    @cached_property
    def _before(self) -> tuple[list[int], str]:
        """An ordinary text: its tokens, and how they are decoded."""
        tokens: list[int] = list(self._tokenizer(_ORDINARY, add_special_tokens=False)["input_ids"])
        return tokens, self._text(tokens)

    def _decoded(self, token: int) -> str:
        """Behind another token, since some tokenizers drop a space at the beginning of a text."""
        before, start = self._before
        both = self._text([*before, token])
        return both[len(start) :] if both.startswith(start) else self._text([token])

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def completion_logprobs(
    found: Sequence[TokenLogprobs], texts: TokenTexts, offset: int
) -> dict[str, object]:
    """OpenAI's form for ``/v1/completions``.

    Args:
        found: of the tokens, in order.
        texts: of single tokens.
        offset: characters of the tokens before them.
    """
    tokens = [texts.of(one.token) for one in found]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [_shown(one.logprob) for one in found],
        "top_logprobs": [_by_text(one, texts) for one in found],
        "text_offset": offsets,
    }


def chat_logprobs(found: Sequence[TokenLogprobs], texts: TokenTexts) -> dict[str, object]:
    """OpenAI's form for ``/v1/chat/completions``.

    Args:
        found: of the tokens, in order.
        texts: of single tokens.
    """
    content = [
        {
            **_chat_token(one.token, one.logprob, texts),
            "top_logprobs": [_chat_token(token, value, texts) for token, value in one.top],
        }
        for one in found
    ]
    return {"content": content, "refusal": None}


def generate_logprobs(whole: FullAnswer, texts: TokenTexts | None) -> Mapping[str, object]:
    """SGLang's form for ``meta_info``; empty if the request wants none.

    Args:
        whole: the answer so far.
        texts: of single tokens; None to leave texts out.
    """
    wanted = whole.asked.request.logprobs
    if wanted is None:
        return {}
    meta: dict[str, object] = {}
    for side, found in (("input", whole.prompt_logprobs), ("output", whole.logprobs)):
        meta[f"{side}_token_logprobs"] = [_triple(one.token, one.logprob, texts) for one in found]
        if wanted.top_n:
            meta[f"{side}_top_logprobs"] = [
                [_triple(token, value, texts) for token, value in one.top] or None for one in found
            ]
    return meta


def _triple(token: int, logprob: float | None, texts: TokenTexts | None) -> list[object]:
    return [_shown(logprob), token, None if texts is None else texts.of(token)]


def _chat_token(token: int, logprob: float | None, texts: TokenTexts) -> dict[str, object]:
    text = texts.of(token)
    whole = "\ufffd" not in text  # else its bytes are not known from its text
    return {
        "token": text,
        "logprob": _shown(logprob),
        "bytes": list(text.encode()) if whole else None,
    }


def _by_text(one: TokenLogprobs, texts: TokenTexts) -> dict[str, float | None] | None:
    """The most probable tokens and the token itself; of equal texts, the most probable."""
    if one.logprob is None:
        return None
    by_text: dict[str, float | None] = {}
    for token, value in (*one.top, (one.token, one.logprob)):
        by_text.setdefault(texts.of(token), _shown(value))
    return by_text


def _shown(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
