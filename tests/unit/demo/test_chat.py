"""Prompts of a conversation: each starts with all tokens of the one before."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hicache_core.demo.chat import Chat

WORDS = (
    *("<unk>", "<start>", "<end>", "system", "user", "assistant"),
    *("rules", "one", "two", "three", "four", "yes", "no"),
)


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>"
    )
    wrapped.chat_template = (
        "{% for m in messages %}<start> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<start> assistant {% endif %}"
    )
    return wrapped


def words(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_a_conversation_follows_the_template(tokenizer: Any) -> None:
    chat = Chat(tokenizer, "rules")
    first = chat.ask("one")
    assert words(first) == "<start> system rules <end> <start> user one <end> <start> assistant"
    assert chat.answered(ids("yes no")) == "yes no"
    second = chat.ask("two")
    assert words(second) == words(first) + " yes no <end> <start> user two <end> <start> assistant"


def test_an_end_of_sequence_in_the_answer_is_not_written_twice(tokenizer: Any) -> None:
    ended, cut = Chat(tokenizer, "rules"), Chat(tokenizer, "rules")
    for chat, answer in ((ended, "yes <end>"), (cut, "yes")):
        chat.ask("one")
        chat.answered(ids(answer))
    assert ended.ask("two") == cut.ask("two")


def test_a_conversation_goes_on_from_its_tokens(tokenizer: Any) -> None:
    chat = Chat(tokenizer, "rules")
    chat.ask("one")
    chat.answered(ids("yes"))
    resumed = Chat(tokenizer, "rules", chat.tokens)
    assert resumed.ask("two") == chat.ask("two")


def test_the_answers_own_tokens_are_kept(tokenizer: Any) -> None:
    """Encoded again, the text of these tokens would be other tokens."""
    chat = Chat(tokenizer, "rules")
    first = chat.ask("one")
    chat.answered([0, 0])
    assert chat.ask("two")[len(first) :][:2] == [0, 0]
