"""The transfer backend: the kit's rules on the real TransferEngine, over tcp."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hicache_mooncake.transfer import (
    EngineCarrier,
    MooncakeTransfer,
    MooncakeTransferConfig,
    align,
)
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.errors import TransferError
from hicache_core.kv_transfer.base import KvTransferBackend, TransferContext, TransferState
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


@pytest.mark.parametrize("layer", [0, 1], ids=["first contact", "later"])
def test_a_sender_that_wakes_up_later_writes_nothing(layer: int) -> None:
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("frozen_sender.py")), str(layer)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        text=True,
    )
    news = threading.Event()
    memory = memory_of(spec_of(), None)
    context = TransferContext(memory, on_notice=news.set)
    decode = MooncakeTransfer(MooncakeTransferConfig(idle_timeout_s=1.0), context)
    try:
        decode.open()
        assert child.stdin is not None
        assert child.stdout is not None
        decode.receive(ROOM, [child.stdout.readline().strip()], [0, 1], (0, 8), WAIT_S)
        deadline = time.monotonic() + WAIT_S / 2
        while not all(any(region) for regions in memory.regions for region in regions[:layer]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.stdin.write("go on\n")
        child.stdin.flush()
        assert news.wait(WAIT_S / 2), "a frozen sender holds a transfer for longer than it may"
        assert [notice.state for notice in decode.poll()] == [TransferState.FAILED]
        given_up = [bytes(region) for regions in memory.regions for region in regions]
        os.kill(child.pid, signal.SIGCONT)
        time.sleep(0.5)
        assert [bytes(region) for regions in memory.regions for region in regions] == given_up
    finally:
        child.kill()
        child.communicate()
        decode.close()


def test_a_host_that_is_not_there_is_an_error() -> None:
    context = TransferContext(memory_of(spec_of(), None))
    backend = MooncakeTransfer(MooncakeTransferConfig(host="no.such.host.invalid"), context)
    with pytest.raises(TransferError, match=r"cannot listen on no\.such\.host\.invalid:0"):
        backend.open()


def test_a_metadata_server_is_refused_since_nobody_would_ask_it() -> None:
    with pytest.raises(ValueError, match="do not set it, or set it to P2PHANDSHAKE"):
        MooncakeTransferConfig(metadata_server="http://127.0.0.1:8080/metadata")
    assert MooncakeTransferConfig(metadata_server="P2PHANDSHAKE") == MooncakeTransferConfig()


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
