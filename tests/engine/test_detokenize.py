"""Text piece by piece: whole characters, and nothing of a stop text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_core.engine.detokenize import TextStream
from hicache_core.engine.model import LoadedModel
from tests.engine.world import ByteTokenizer

TEXTS = st.text(alphabet="abcäß€漢🙂👩‍🚀 \n", max_size=24)


def streamed(
    ids: list[int], stops: tuple[str, ...] = (), n_free: int = 0
) -> tuple[list[str], bool]:
    """The pieces, and whether a stop text ended them."""
    stream = TextStream(ByteTokenizer(), stops)
    pieces: list[str] = []
    for n, token in enumerate(ids, start=1):
        piece, stopped = stream.push(token, may_stop=n >= n_free)
        pieces.append(piece)
        if stopped:
            return pieces, True
    return [*pieces, stream.finish()], False


@settings(deadline=None)
@given(TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(text: str) -> None:
    pieces, _ = streamed(list(text.encode()))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(0, 511), max_size=24))
def test_any_tokens_give_what_the_tokenizer_makes_of_them(ids: list[int]) -> None:
    pieces, _ = streamed(ids)
    whole = ByteTokenizer().decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert "".join(pieces) == whole


@settings(deadline=None)
@given(TEXTS, st.lists(TEXTS.filter(bool), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_text_and_leaks_nothing_of_it(
    text: str, stops: list[str]
) -> None:
    pieces, stopped = streamed(list(text.encode()), tuple(stops))
    # Byte by byte the first stop text to be complete wins, and it is cut where it begins.
    ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
    if not ends:
        assert (pieces and "".join(pieces), stopped) == (text, False)
        return
    first_end = min(ends.values())
    starts = [text.find(stop) for stop, end in ends.items() if end == first_end]
    assert stopped
    assert "".join(pieces) == text[: min(starts)]


def test_what_turns_out_to_be_no_stop_text_comes_later() -> None:
    pieces, stopped = streamed(list(b"xENx"), ("END",))
    assert (pieces, stopped) == (["x", "", "", "ENx", ""], False)


def test_the_beginning_of_a_stop_text_at_the_end_is_text() -> None:
    pieces, _ = streamed(list(b"xEN"), ("END",))
    assert pieces == ["x", "", "", "EN"]


def test_a_stop_text_that_may_not_stop_yet_is_text() -> None:
    pieces, stopped = streamed(list(b"a.b.c"), (".",), n_free=3)
    assert ("".join(pieces), stopped) == ("a.b", True)


def test_special_tokens_are_no_text() -> None:
    assert "".join(streamed([104, 510, 105, 511])[0]) == "hi"


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, ("x",))
    assert stream.push(1) == ("", False)
    assert stream.finish() == ""


@pytest.mark.slow
def test_a_real_tokenizer_gives_the_same_text_in_pieces(smollm2: LoadedModel) -> None:
    """SmolLM2's: bytes that are no character of their own, and spaces inside tokens."""
    tokenizer = smollm2.tokenizer
    text = "Grüße, 漢字 and 🙂👩‍🚀!  Two spaces,\n\ta tab; naïve café – it's done."
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token)[0] for token in ids] + [stream.finish()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
