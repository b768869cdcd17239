"""The transfer backend: the kit's rules on the real TransferEngine, over tcp."""

from __future__ import annotations

import importlib.util
import os

import pytest
from hicache_mooncake.transfer import (
    EngineCarrier,
    MooncakeTransfer,
    MooncakeTransferConfig,
    align,
)
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.disaggregation.transfer import KvTransferBackend, TransferContext, TransferState
from hicache_core.testing.transfer_kit import ROOM, WAIT_S, TransferKit, memory_of, spec_of

if importlib.util.find_spec("mooncake") is None and not os.environ.get("CI"):
    pytest.skip("Mooncake's client is not installed", allow_module_level=True)


class TestMooncake(TransferKit):
    def make(self, context: TransferContext) -> KvTransferBackend:
        return MooncakeTransfer(MooncakeTransferConfig(ping_s=0.05, idle_timeout_s=5.0), context)

    def test_rows_that_are_not_what_was_promised_are_not_taken(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As if a sender's page had got another owner between the promise and the read."""
        honest = EngineCarrier.send_rows

        def late(self, peer, frame, segments):
            segments[0][0] ^= 1
            honest(self, peer, frame, segments)

        monkeypatch.setattr(EngineCarrier, "send_rows", late)
        prefill, decode = self.pair()
        prefill.backend.offer(ROOM, 4, WAIT_S)
        prefill.send_all([0], 4)
        decode.backend.receive(ROOM, [prefill.backend.address], [0], (0, 4), WAIT_S)
        failed = decode.notice()
        assert failed.state is TransferState.FAILED
        assert "the checksum of layer 0, tokens 0 to 4" in failed.error


def test_a_protocol_that_is_not_there_is_an_error() -> None:
    context = TransferContext(memory_of(spec_of(), None))
    backend = MooncakeTransfer(MooncakeTransferConfig(host="no.such.host.invalid"), context)
    with pytest.raises(ConnectionError):
        backend.open()


@given(st.lists(st.integers(1, 9), min_size=1), st.randoms())
def test_copies_cover_both_sides_once(sizes: list[int], source) -> None:
    other: list[int] = []
    left = sum(sizes)
    while left:
        other.append(source.randint(1, left))
        left -= other[-1]

    def places(sizes: list[int], base: int) -> list[tuple[int, int]]:
        return [(base + 1000 * n, size) for n, size in enumerate(sizes)]

    def addresses(places: list[tuple[int, int]]) -> list[int]:
        return [address + at for address, n in places for at in range(n)]

    sources, targets = places(sizes, 10**6), places(other, 10**9)
    copies = align(sources, targets)
    assert addresses([(a, n) for a, _, n in copies]) == addresses(sources)
    assert addresses([(b, n) for _, b, n in copies]) == addresses(targets)
