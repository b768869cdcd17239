"""Prefill and decode apart, of models with windows and states: tokens are the plain model's."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hicache_core.build.cache import HiCache
from hicache_core.engine.engine import Engine
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import Bootstrap
from hicache_core.errors import SpecError
from hicache_core.kv_transfer.tcp import TcpTransfer
from hicache_core.types import CachedTokens
from tests.engine.test_engine import PATIENCE_S, Client
from tests.engine.test_groups import N_NEW, loaded_model, prompt
from tests.engine.world import PAGE_SIZE, plain
from tests.page_path.mixed_models import MIXED, WINDOW
from tests.pd.test_roles import Half, half, leave, room_at, wait_until

DEVICE_ONLY = {"enable_hierarchical_cache": False}
EVERY_DAY = {"gemma3", "lfm3", "mamba2"}
"""A window, a window and a state, and a state alone; the others run in the full depth."""


@pytest.fixture(
    params=[
        name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.full)
        for name in MIXED
        if name != "kimi_linear"  # which takes minutes, in transformers' own code for a CPU
    ]
)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded_model(request.param)


@contextmanager
def pair(
    loaded: LoadedModel, cache: dict[str, Any] | None = None, **config: Any
) -> Iterator[tuple[Half, Half]]:
    """Both halves, with chunks that end inside pages and windows."""
    config = {"chunk_tokens": 5, "max_running": 4, **config}
    with (
        half("prefill", cache or DEVICE_ONLY, loaded=loaded, **config) as prefill,
        half("decode", cache or DEVICE_ONLY, loaded=loaded, **config) as decode,
    ):
        yield prefill, decode


def ask(
    prefill: Half, decode: Half, prompts: Sequence[list[int]], n_new: int = N_NEW
) -> list[Client]:
    """Asks both halves for all prompts at once; those that answer."""
    answers = []
    for each in prompts:
        room = room_at(prefill)
        answers.append(decode.ask(each, room, n_new)[1])
        prefill.ask(each, room)
    return answers


def check(
    loaded: LoadedModel, prompts: Sequence[list[int]], answers: Sequence[Client], n_new: int = N_NEW
) -> list[CachedTokens]:
    """Every answer is that of the plain model; what the prefill half had of each prompt."""
    cached = []
    for each, answer in zip(prompts, answers, strict=True):
        cached.append(answer.wait().cached)
        assert answer.tokens == plain(loaded, each, n_new)
    return cached


def test_the_decode_half_goes_on_from_window_and_state(loaded: LoadedModel) -> None:
    """Prompts around a page and a window, then again, then as the next turns."""
    lengths = (1, WINDOW, 2 * PAGE_SIZE + 1, 43)
    prompts = [prompt(n, seed=n) for n in lengths]
    with pair(loaded, timeout_s=PATIENCE_S) as (prefill, decode):
        for n_round, n_cached in enumerate(([0] * 4, [0, 8, 8, 40])):
            cached = check(loaded, prompts, ask(prefill, decode, prompts))
            assert cached == [CachedTokens(device=n) for n in n_cached]
            assert decode.role.counts.received == (n_round + 1) * len(prompts)
        turns = [each + list(plain(loaded, each, N_NEW)) + prompt(3, seed=9) for each in prompts]
        check(loaded, turns, ask(prefill, decode, turns))
        assert decode.role.counts.received == 3 * len(prompts)
        assert decode.role.counts.recomputed == 0
        assert decode.engine.status().prefill_tokens_per_s == 0.0
        wait_until(lambda: prefill.role.counts.sent == 3 * len(prompts))
        (sent,), (received,) = prefill.role.transfers(), decode.role.transfers()
        assert sent.nbytes["sent"] == received.nbytes["received"] == decode.role.counts.nbytes


HYBRID = "lfm3"
"""Has a window, a state and full attention."""


@pytest.fixture
def hybrid() -> LoadedModel:
    return loaded_model(HYBRID)


def test_of_a_window_its_last_pages_are_sent_and_of_a_state_one_unit(hybrid: LoadedModel) -> None:
    prompts = [prompt(43)]
    with pair(hybrid) as (prefill, decode):
        check(hybrid, prompts, ask(prefill, decode, prompts))
        spec = decode.engine.pool.spec
        first = (40 - WINDOW + 1) // PAGE_SIZE * PAGE_SIZE  # what the last whole page needs
        rows = {"swa": 43 - first, "mamba": 1}
        expected = 43 * spec.token_nbytes
        expected += sum(rows[group.name] * group.spec.token_nbytes for group in spec.groups)
        assert decode.role.counts.nbytes == expected
        layers = range(spec.num_layers)
        n_full, n_swa = (
            sum(bool(its.components_in(layer)) for layer in layers)
            for its in (spec, spec.groups[0].spec)
        )
        (received,) = decode.role.transfers()
        assert received.rows["received"] == 43 * n_full + rows["swa"] * n_swa


def test_what_is_on_the_host_is_sent_and_received_like_the_rest(hybrid: LoadedModel) -> None:
    prompts = [prompt(43), prompt(17, seed=1)]
    with pair(hybrid, {"enable_hierarchical_cache": True}) as (prefill, decode):
        check(hybrid, prompts, ask(prefill, decode, prompts))
        for half_ in (prefill, decode):
            half_.engine.call(functools.partial(empty_device, half_.engine), 30.0)
        cached = check(hybrid, prompts, ask(prefill, decode, prompts))
        assert cached == [CachedTokens(host=40), CachedTokens(host=16)]
        assert decode.role.counts.received == 4


def empty_device(engine: Engine, cache: HiCache) -> None:
    """Moves everything to the host."""
    assert cache.flush(20.0)
    cache.evict(engine.pool.n_pages)
    for group, pool in enumerate(engine.pool.groups):
        cache.free_units(group, cache.allocate_units(group, pool.n_pages))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_client_that_leaves_takes_its_units_along(when: str, hybrid: LoadedModel) -> None:
    asked = prompt(43)
    with pair(hybrid) as (prefill, decode):
        room = room_at(prefill)
        request_id, answering = decode.ask(asked, room, n_new=300)
        if when == "after":
            prefill.ask(asked, room)
            answering.wait(2)
        leave(decode, request_id, answering)
        if when == "before":
            leave(prefill, *prefill.ask(asked, room))
        for half_ in (prefill, decode):
            wait_until(lambda half_=half_: half_.engine.status().used_slots == 0)  # type: ignore[misc]
            half_.engine.call(functools.partial(empty_device, half_.engine), 30.0)


def test_rows_that_do_not_come_are_computed_here(hybrid: LoadedModel) -> None:
    prompts = [prompt(43, seed=n) for n in range(3)]
    with pair(hybrid, max_running=1) as (prefill, decode):
        nobody = Bootstrap("127.0.0.1", 1, 5)
        check(hybrid, prompts[:1], [decode.ask(prompts[0], nobody, N_NEW)[1]])
        assert "no prefill node answers" in decode.role.counts.last_error
        _, busy = prefill.ask(prompt(8), None, n_new=300)
        busy.wait(1)
        rooms = [room_at(prefill) for _ in prompts[1:]]
        asked = [prefill.ask(each, room) for each, room in zip(prompts[1:], rooms, strict=True)]
        answers = [
            decode.ask(each, room, N_NEW)[1] for each, room in zip(prompts[1:], rooms, strict=True)
        ]
        for request_id, _ in asked:
            prefill.engine.abort(request_id)
        check(hybrid, prompts[1:], answers)
        assert decode.role.counts.recomputed == 3


def test_too_little_room_for_pages_or_units_is_no_loss(hybrid: LoadedModel) -> None:
    """Requests wait, start over, and give up what they received when others need it."""
    prompts = [prompt(22 + n, seed=n) for n in range(4)]
    with pair(hybrid, max_running=3, device_tokens=84) as (prefill, decode):
        answers = ask(prefill, decode, prompts, n_new=24)
        check(hybrid, prompts, answers, n_new=24)
        assert decode.engine._scheduler.tally.failed == 0


def test_equal_prompts_in_flight_end_in_a_pool_that_one_of_them_nearly_fills(
    hybrid: LoadedModel,
) -> None:
    n_new = (2, 24)
    with pair(hybrid, device_tokens=84, offload_stride=1) as (prefill, decode):
        rooms = [room_at(prefill) for _ in n_new]
        answers = [
            decode.ask(prompt(40), room, n)[1] for room, n in zip(rooms, n_new, strict=True)
        ]  # both are fetched before either has arrived
        for room in rooms:
            prefill.ask(prompt(40), room)
        for answer, n in zip(answers, n_new, strict=True):
            check(hybrid, [prompt(40)], [answer], n)


def test_the_next_turn_finds_what_the_decode_half_generated(
    hybrid: LoadedModel, tmp_path: Path
) -> None:
    """Storage is all that the second prefill half shares: it has windows and snapshots."""
    storage = {
        "hicache_storage_backend": "file",
        "extra": {"path": str(tmp_path)},
        "hicache_host_retention": "free_once_stored",
    }
    asked = prompt(22)
    with half("decode", storage, loaded=hybrid, offload_stride=1) as decode:
        with half("prefill", storage, loaded=hybrid) as first:
            check(hybrid, [asked], ask(first, decode, [asked], n_new=20), n_new=20)
            assert decode.engine.call(lambda cache: cache.flush(20.0), 30.0)
        longer = [*asked, *plain(hybrid, asked, 20), *prompt(5, seed=3)]
        with half("prefill", storage, loaded=hybrid) as second:
            cached = check(hybrid, [longer], ask(second, decode, [longer]))
    n_stored = (len(asked) + 20 - 1) // PAGE_SIZE * PAGE_SIZE  # the last one was never computed
    assert cached == [CachedTokens(storage=n_stored)]


def test_a_backend_without_groups_gets_windows_in_the_full_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a state, which it cannot move, is refused."""
    monkeypatch.setattr(TcpTransfer, "moves_groups", False)
    loaded, prompts = loaded_model("gemma3"), [prompt(43)]
    with pair(loaded) as (prefill, decode):
        assert decode.engine.pool.spec.groups == ()
        check(loaded, prompts, ask(prefill, decode, prompts))
        assert decode.role.counts.received == 1
    with (
        pytest.raises(SpecError, match=r"keep a state.* a transfer backend that moves groups"),
        half("decode", loaded=loaded_model("mamba2")),
    ):
        pass
