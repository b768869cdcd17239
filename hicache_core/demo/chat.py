"""A conversation as tokens: each turn's prompt starts with all tokens of the turn before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Stands in for an answer, to find out what the chat template puts around it.
_ANSWER = "<<the answer>>"


class Chat:
    """Turns questions into prompts, by the tokenizer's chat template.

    The answer's tokens are kept as the model gave them, never decoded and encoded again: a
    tokenizer may split the same text in another way, and the prefix would end there.
    """

    def __init__(self, tokenizer: Any, system_prompt: str, tokens: Sequence[int] = ()) -> None:
        """Starts a conversation, or continues one.

        Args:
            tokenizer: of transformers, with a chat template.
            system_prompt: text of the system message.
            tokens: the conversation so far: the last prompt and its answer; empty to start.
        """
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self.tokens = list(tokens)

    def ask(self, question: str) -> list[int]:
        """The prompt for ``question``; ``tokens`` become that prompt."""
        if not self.tokens:
            self.tokens = self._encode(self._render(question))
        else:
            rendered = self._render("?", _ANSWER, question)
            between = self._encode(rendered.split(_ANSWER, 1)[1])
            self.tokens = [*self.tokens, *between]
        return list(self.tokens)

    def answered(self, tokens: Sequence[int]) -> str:
        """Adds the model's answer; its text. An end of sequence is left to the template."""
        kept = [token for token in tokens if token != self._tokenizer.eos_token_id]
        self.tokens = [*self.tokens, *kept]
        return str(self._tokenizer.decode(kept)).strip()

    def _render(self, *parts: str) -> str:
        """The template's text for question, answer, question, … and the start of an answer."""
        messages = [{"role": "system", "content": self._system_prompt}]
        for n, part in enumerate(parts):
            messages.append({"role": ("user", "assistant")[n % 2], "content": part})
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)
