"""What a prefill node says beside the rows is believed only if it can be true."""

from __future__ import annotations

import json

import pytest

from hicache_core.disaggregation.first_token import FirstToken
from hicache_core.errors import TransferError
from hicache_core.types import CachedTokens

N_PROMPT, VOCABULARY = 64, 512


def note(token: object, *cached: object) -> bytes:
    return json.dumps({"token": token, "cached": cached or [0, 0, 0]}).encode()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"{}",
        b"\xff",
        b"[" * 60_000,
        b'{"token": ' + b"[" * 30_000,
        b'{"token": ' + b"9" * 5000 + b', "cached": [0, 0, 0]}',
        b'{"token": NaN, "cached": [0, 0, 0]}',
        b'{"token": 1, "cached": "abc"}',
        note(-1),
        note(VOCABULARY),
        note(2**40),
        note(1.0),
        note(True),
        note(1, 0, 0),
        note(1, -1, 0, 0),
        note(1, 10**18, 0, 0),
        note(1, N_PROMPT, 1, 0),
    ],
    ids=lambda said: said[:40].decode(errors="replace"),
)
def test_nonsense_is_an_error_in_few_words(said: bytes) -> None:
    with pytest.raises(TransferError) as caught:
        FirstToken.unpack(said, N_PROMPT, VOCABULARY)
    assert len(str(caught.value)) < 200


def test_what_was_packed_is_what_is_unpacked() -> None:
    first = FirstToken(VOCABULARY - 1, CachedTokens(32, 16, 16))
    assert FirstToken.unpack(first.pack(), N_PROMPT, VOCABULARY) == first
