"""Rows that come late: the pages of a fetch that was given up have no other owner until then."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from hicache_core.kv_transfer.carrier import InlineCarrier
from hicache_core.kv_transfer.wire import Connection, Frame
from tests.engine.world import PAGE_SIZE, model_of, plain, prompt_of
from tests.pd.test_roles import half, pair, room_at

WAIT_S = 30.0


class LateWriter:
    """Makes the first thread that receives rows wait before it writes them into their pages.

    So a thread of any carrier may stand at the moment at which a request is given up.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_about_to_write, self.may_write = threading.Event(), threading.Event()
        honest = InlineCarrier.receive_rows

        def late(
            carrier: InlineCarrier,
            peer: Connection,
            frame: Frame,
            segments: Sequence[memoryview],
            greeting: dict[str, Any],
        ) -> None:
            rows = [memoryview(bytearray(segment.nbytes)) for segment in segments]
            honest(carrier, peer, frame, rows, greeting)
            self.is_about_to_write.set()
            self.may_write.wait(WAIT_S)
            for segment, row in zip(segments, rows, strict=True):
                segment[:] = row

        monkeypatch.setattr(InlineCarrier, "receive_rows", late)


def test_pages_of_a_fetch_that_was_given_up_are_taken_until_nobody_writes_into_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client leaves while a thread is about to write; others want all the room there is."""
    writer = LateWriter(monkeypatch)
    given_up, others = prompt_of(40), [prompt_of(24 + n, seed=n) for n in range(1, 7)]

    def n_used(half: Any) -> int:
        return int(half.engine.call(lambda cache: cache.snapshot().device.used_pages, WAIT_S))

    with pair() as (prefill, _), half("decode", {"enable_hierarchical_cache": False}) as decode:
        try:
            room = room_at(prefill)
            prefill.ask(given_up, room)
            request_id, leaving = decode.ask(given_up, room)
            assert writer.is_about_to_write.wait(WAIT_S)
            decode.engine.abort(request_id)
            assert leaving.wait().finish_reason == "abort"
            assert n_used(decode) == len(given_up) // PAGE_SIZE
            answers = [decode.ask(prompt, None)[1] for prompt in others]
            answers[-1].wait(1)
        finally:
            writer.may_write.set()
        for prompt, answer in zip(others, answers, strict=True):
            answer.wait()
            assert answer.tokens == plain(model_of(), prompt, 12)
        deadline = time.monotonic() + WAIT_S
        while decode.engine.status().used_slots:
            assert time.monotonic() < deadline
            time.sleep(0.01)
