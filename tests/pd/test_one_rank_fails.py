"""A decode half of two ranks: what fails on one of them is computed by both."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from hicache_core.disaggregation.roles import Role, RoleSettings
from hicache_core.engine.engine import Engine, EngineConfig
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.tensor_ranks import TensorRanks
from hicache_core.kv_transfer.tcp import TcpTransfer
from tests.engine.tp_world import PATIENCE_S, split_model
from tests.engine.world import cache_config, plain, prompt_of
from tests.fork_server import CONTEXT
from tests.pd.test_roles import SETTINGS, Half, room_at

WHOLE = LoadedModel("llama", split_model(), None)


class Lame(TcpTransfer):
    """Fetches every second room from where nobody is."""

    def receive(
        self,
        room: int,
        addresses: Sequence[str],
        pages: Sequence[int],
        tokens: tuple[int, int],
        timeout_s: float,
    ) -> None:
        addresses = ["127.0.0.1:1"] if room % 2 else addresses
        super().receive(room, addresses, pages, tokens, timeout_s)


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Runs before any test looks at its descriptors."""
    forkserver.ensure_running()


def made(mode: str, ranks: TensorRanks | None = None) -> Half:
    """A half that is not open yet."""
    role = Role(RoleSettings(mode, "tcp", SETTINGS, timeout_s=20.0))
    engine = Engine(
        LoadedModel("llama", split_model(), None),
        cache_config(enable_hierarchical_cache=False),
        EngineConfig(device_tokens=512, chunk_tokens=16),
        ranks=ranks,
        make_scheduler=role.make_scheduler,
    )
    return Half(role, engine)


@contextmanager
def opened(half: Half) -> Iterator[Half]:
    """At the end nothing is held by anybody but the tree."""
    half.engine.open()
    try:
        yield half
        half.engine.call(lambda cache: cache.check_integrity(), PATIENCE_S)
    finally:
        half.engine.close(PATIENCE_S)
    status = half.engine.status()
    assert (status.waiting, status.running, status.error) == (0, 0, "")


@contextmanager
def two_ranks(mode: str, store: str) -> Iterator[Half]:
    """A half of which rank 1 is a process with a lame transfer."""
    process = CONTEXT.Process(target=follow, args=(mode, store))
    process.start()
    try:
        with (
            TensorRanks.create(0, 2, store, timeout_s=PATIENCE_S) as ranks,
            opened(made(mode, ranks)) as half,
        ):
            yield half
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        process.close()


def follow(mode: str, store: str) -> None:
    """The whole life of rank 1."""
    torch.set_num_threads(1)
    with TensorRanks.create(1, 2, store, timeout_s=PATIENCE_S) as ranks:
        half = made(mode, ranks)
        half.role._class = Lame
        half.engine.open()
        half.engine.join()
    sys.exit(1 if half.engine.status().error else 0)


def test_all_ranks_compute_what_one_of_them_did_not_get(tmp_path: Path) -> None:
    prompts = [prompt_of(20 + 3 * n, seed=n) for n in range(6)]
    with (
        opened(made("prefill")) as prefill,
        two_ranks("decode", f"file://{tmp_path / 'meeting'}") as decode,
    ):
        rooms = [room_at(prefill) for _ in prompts]
        answers = [decode.ask(prompt, room)[1] for prompt, room in zip(prompts, rooms, strict=True)]
        left_id, left = decode.ask(prompt_of(40, seed=9), room_at(prefill))
        for prompt, room in zip(prompts, rooms, strict=True):
            prefill.ask(prompt, room)
        decode.engine.abort(left_id)
        for prompt, answer in zip(prompts, answers, strict=True):
            answer.wait()
            assert answer.tokens == plain(WHOLE, prompt, 12)
        assert left.wait().finish_reason == "abort"
        n_lost = sum(room.room % 2 for room in rooms)
        figures = decode.role.counts
        assert (figures.received, figures.recomputed) == (len(rooms) - n_lost, n_lost)
        assert n_lost > 0
        assert "rank 1: no prefill node answers at 127.0.0.1:1" in figures.last_error
