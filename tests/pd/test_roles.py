"""Two engines in one process, a tiny model: tokens are those of one plain model, whatever fails."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hicache_core.disaggregation.first_token import FirstToken
from hicache_core.disaggregation.roles import Role, RoleSettings
from hicache_core.engine.engine import Engine, EngineConfig
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import Bootstrap, Request
from hicache_core.errors import ConfigError
from hicache_core.types import CachedTokens
from tests.engine.test_engine import PATIENCE_S, Client
from tests.engine.world import PAGE_SIZE, cache_config, greedy, model_of, plain, prompt_of
from tests.pd.audit import audited

ROOMS = itertools.count(1)
SETTINGS = {"ping_s": 0.05, "idle_timeout_s": 5.0}


@dataclass
class Half:
    """An engine with a role."""

    role: Role
    engine: Engine

    def ask(
        self, prompt: Sequence[int], bootstrap: Bootstrap | None, n_new: int = 12
    ) -> tuple[str, Client]:
        """Submits a request."""
        client = Client()
        request_id = f"r{next(ROOMS)}"
        request = Request(request_id, tuple(prompt), greedy(n_new), bootstrap=bootstrap)
        self.engine.submit(request, client)
        return request_id, client


@contextmanager
def half(
    mode: str,
    cache: dict[str, Any] | None = None,
    secret: str | None = None,
    *,
    loaded: LoadedModel | None = None,
    backend: str = "tcp",
    close_s: float = 20.0,
    timeout_s: float = 20.0,
    **config: Any,
) -> Iterator[Half]:
    """An open engine; after each step, and at the end, nothing is held by nobody."""
    role = Role(RoleSettings(mode, backend, {**SETTINGS, "secret": secret}, timeout_s))
    engine = Engine(
        loaded or model_of(),
        cache_config(**(cache or {})),
        EngineConfig(**{"device_tokens": 512, "chunk_tokens": 16, **config}),
        make_scheduler=audited(role.make_scheduler),
        moves_groups=role.moves_groups,
    )
    engine.open()
    try:
        yield Half(role, engine)
        engine.call(lambda opened: opened.check_integrity(), 30.0)
    finally:
        engine.close(close_s)
    status = engine.status()
    assert (status.waiting, status.running, status.error) == (0, 0, "")


def room_at(prefill: Half) -> Bootstrap:
    """A new room at a prefill half."""
    host, port = prefill.role.address.split(":")
    return Bootstrap(host, int(port), next(ROOMS))


@contextmanager
def pair(**config: Any) -> Iterator[tuple[Half, Half]]:
    """A prefill and a decode half, without host and storage."""
    device_only = {"enable_hierarchical_cache": False}
    with half("prefill", device_only, **config) as prefill, half("decode", device_only) as decode:
        yield prefill, decode


@pytest.mark.parametrize("n_prompt", [1, 3, 4, 5, 16, 17, 47])
def test_the_decode_half_goes_on_where_the_prefill_half_stopped(n_prompt: int) -> None:
    prompt = prompt_of(n_prompt, seed=n_prompt)
    with pair() as (prefill, decode):
        room = room_at(prefill)
        _, computing = prefill.ask(prompt, room)
        _, answering = decode.ask(prompt, room)
        assert answering.wait().finish_reason == "length"
        assert answering.tokens == plain(model_of(), prompt, 12)
        assert computing.wait().completion_tokens == 1
        assert decode.role.counts.received == 1
        assert decode.engine.status().prefill_tokens_per_s == 0.0
        while not prefill.role.transfers()[0].outcomes:
            prefill.engine.call(lambda _: None, 10.0)
        (sent,), (received,) = prefill.role.transfers(), decode.role.transfers()
        assert sent.nbytes["sent"] == received.nbytes["received"] == decode.role.counts.nbytes
        assert received.rows["received"] == n_prompt * model_of().model.config.num_hidden_layers
        assert received.outcomes == {"arrived": 1}


def test_the_order_of_arrival_does_not_count() -> None:
    prompt = prompt_of(40)
    with pair() as (prefill, decode):
        room = room_at(prefill)
        _, answering = decode.ask(prompt, room)
        prefill.ask(prompt, room)[1].wait()
        answering.wait()
        assert answering.tokens == plain(model_of(), prompt, 12)


def test_many_requests_at_once() -> None:
    prompts = [prompt_of(10 + 7 * n, seed=n) for n in range(10)]
    with pair() as (prefill, decode):
        answers = []
        for prompt in prompts:
            room = room_at(prefill)
            answers.append(decode.ask(prompt, room)[1])
            prefill.ask(prompt, room)
        for prompt, answer in zip(prompts, answers, strict=True):
            answer.wait()
            assert answer.tokens == plain(model_of(), prompt, 12)
        assert decode.role.counts.received == 10
        assert decode.role.counts.recomputed == 0


def test_what_both_have_already_is_neither_computed_nor_sent() -> None:
    prompt = prompt_of(40)
    with pair() as (prefill, decode):
        nbytes = []
        for longer in (prompt, prompt + prompt_of(8, seed=9)):
            room = room_at(prefill)
            prefill.ask(longer, room)
            _, answer = decode.ask(longer, room)
            last = answer.wait()
            assert answer.tokens == plain(model_of(), longer, 12)
            nbytes.append(decode.role.counts.nbytes - sum(nbytes))
        assert last.cached == CachedTokens(device=40)
        assert [n * 40 // nbytes[0] for n in nbytes] == [40, 8]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_client_that_leaves_the_decode_half_leaves_nothing_behind(when: str) -> None:
    prompt = prompt_of(40)
    with pair() as (prefill, decode):
        room = room_at(prefill)
        request_id, answering = decode.ask(prompt, room, n_new=400)
        if when == "after":
            prefill.ask(prompt, room)
            answering.wait(2)
        decode.engine.abort(request_id)
        assert answering.wait().finish_reason == "abort"
        if when == "before":
            leave(prefill, *prefill.ask(prompt, room))


def leave(half: Half, request_id: str, client: Client) -> None:
    """Ends a request as a server does whose client closes the connection."""
    half.engine.abort(request_id)
    client.wait()


def test_who_asks_a_prefill_half_is_answered_when_the_rows_were_fetched() -> None:
    """So whoever leaves before is noticed."""
    prompt = prompt_of(40)
    with pair() as (prefill, decode):
        room = room_at(prefill)
        _, computing = prefill.ask(prompt, room)
        wait_until(lambda: prefill.engine.status().finished == 1)
        prefill.engine.call(lambda _: None, 10.0)  # a step further
        assert computing.outputs == []
        decode.ask(prompt, room)[1].wait()
        assert computing.wait().completion_tokens == 1
        assert prefill.role.counts.sent == 1


def test_a_client_that_leaves_while_the_decode_half_has_no_slot_frees_the_prefill_half() -> None:
    prompt, device_only = prompt_of(40), {"enable_hierarchical_cache": False}
    with ExitStack() as stack:
        prefill = stack.enter_context(half("prefill", device_only))
        decode = stack.enter_context(half("decode", device_only, max_running=1))
        busy_id, busy = decode.ask(prompt_of(8), None, n_new=400)
        busy.wait(1)
        room = room_at(prefill)
        computing, answering = prefill.ask(prompt, room), decode.ask(prompt, room)
        wait_until(lambda: prefill.engine.status().finished == 1)
        assert prefill.engine.status().used_slots == 40
        leave(prefill, *computing)
        leave(decode, *answering)
        wait_until(lambda: prefill.engine.status().used_slots == 0)
        assert prefill.role.counts.last_error == "the client has left"
        leave(decode, busy_id, busy)


def test_a_prefill_half_that_closes_answers_who_waits_for_a_fetch() -> None:
    with half("prefill", close_s=0.1) as prefill:
        _, computing = prefill.ask(prompt_of(40), room_at(prefill))
        wait_until(lambda: prefill.engine.status().finished == 1)
    assert computing.wait().completion_tokens == 1


def wait_until(condition: Callable[[], bool]) -> None:
    """Looks until ``condition`` holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_request_that_the_prefill_half_gives_up_is_computed_by_the_decode_half() -> None:
    prompt = prompt_of(40)
    with pair(max_running=1) as (prefill, decode):
        _, busy = prefill.ask(prompt_of(8), None, n_new=400)
        busy.wait(1)
        room = room_at(prefill)
        request_id, _ = prefill.ask(prompt, room)
        _, answering = decode.ask(prompt, room)
        prefill.engine.abort(request_id)
        answering.wait()
        assert answering.tokens == plain(model_of(), prompt, 12)
        assert decode.role.counts.recomputed == 1


@pytest.mark.parametrize("note", [b"[" * 60_000, b'{"token": 1099511627776, "cached": [0, 0, 0]}'])
def test_nonsense_of_a_prefill_half_costs_its_own_request(
    note: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, other = prompt_of(40), prompt_of(30, seed=2)
    with pair() as (prefill, decode):
        room = room_at(prefill)
        monkeypatch.setattr(FirstToken, "pack", lambda _: note)
        prefill.ask(prompt, room)
        _, answering = decode.ask(prompt, room)
        answering.wait()
        assert answering.tokens == plain(model_of(), prompt, 12)
        assert decode.role.counts.recomputed == 1
        _, answering = decode.ask(other, None)
        answering.wait()
        assert answering.tokens == plain(model_of(), other, 12)


def test_without_a_prefill_half_the_decode_half_computes() -> None:
    prompt = prompt_of(40)
    with half("decode") as decode:
        _, answering = decode.ask(prompt, Bootstrap("127.0.0.1", 1, 5))
        answering.wait()
        assert answering.tokens == plain(model_of(), prompt, 12)
        assert "no prefill node answers at 127.0.0.1:1" in decode.role.counts.last_error


def test_a_half_with_another_secret_is_refused_and_the_decode_half_computes() -> None:
    prompt = prompt_of(40)
    with half("prefill", secret="a" * 16) as prefill, half("decode", secret="b" * 16) as decode:
        room = room_at(prefill)
        computing = prefill.ask(prompt, room)
        _, answering = decode.ask(prompt, room)
        answering.wait()
        leave(prefill, *computing)
        assert answering.tokens == plain(model_of(), prompt, 12)
        assert decode.role.counts.recomputed == 1
        assert "different shared secrets" in decode.role.counts.last_error


def test_a_prefill_half_that_ends_in_the_middle_is_no_loss() -> None:
    prompts = [prompt_of(60, seed=n) for n in range(4)]
    with half("decode") as decode:
        with half("prefill", max_running=1) as prefill:
            rooms = [room_at(prefill) for _ in prompts]
            answers = [
                decode.ask(prompt, room)[1] for prompt, room in zip(prompts, rooms, strict=True)
            ]
            for prompt, room in zip(prompts[:2], rooms, strict=False):
                prefill.ask(prompt, room)
        for prompt, answer in zip(prompts, answers, strict=True):
            answer.wait()
            assert answer.tokens == plain(model_of(), prompt, 12)


def test_too_little_room_on_either_side_is_no_loss() -> None:
    prompts = [prompt_of(30, seed=n) for n in range(8)]
    small = {"device_tokens": 80}
    with half("prefill", **small) as prefill, half("decode", **small) as decode:
        answers = []
        for prompt in prompts:
            room = room_at(prefill)
            answers.append(decode.ask(prompt, room)[1])
            prefill.ask(prompt, room)
        for prompt, answer in zip(prompts, answers, strict=True):
            answer.wait()
            assert answer.tokens == plain(model_of(), prompt, 12)


@pytest.mark.parametrize("where", ["go_on", "prefill"])
def test_an_error_of_one_request_ends_neither_half(where: str) -> None:
    prompts = [prompt_of(40, seed=n) for n in range(2)]
    with half("prefill") as prefill, half("decode") as decode:
        owner: Any = decode.engine._scheduler
        if where == "prefill":
            owner = prefill.engine._scheduler._runner
        works = getattr(owner, where)

        def fails(*_: object, **__: object) -> None:
            raise ZeroDivisionError("no such luck")

        setattr(owner, where, fails)
        room = room_at(prefill)
        _, computing = prefill.ask(prompts[0], room)
        _, answering = decode.ask(prompts[0], room)
        answering.wait()
        if where == "prefill":
            assert "no such luck" in computing.wait().error
            assert answering.tokens == plain(model_of(), prompts[0], 12)
        else:
            assert "no such luck" in answering.wait().error
        setattr(owner, where, works)
        room = room_at(prefill)
        prefill.ask(prompts[1], room)
        _, answering = decode.ask(prompts[1], room)
        answering.wait()
        assert answering.tokens == plain(model_of(), prompts[1], 12)


@pytest.mark.parametrize("offload_stride", [0, 1, 2])
def test_equal_prompts_in_flight_at_once_end_in_a_pool_that_one_of_them_nearly_fills(
    offload_stride: int,
) -> None:
    prompt, n_new = prompt_of(40), (2, 24)
    small = {"device_tokens": 84, "offload_stride": offload_stride}
    with half("prefill") as prefill, half("decode", **small) as decode:
        rooms = [room_at(prefill) for _ in n_new]
        answers = [
            decode.ask(prompt, room, n)[1] for room, n in zip(rooms, n_new, strict=True)
        ]  # both are fetched before either has arrived
        for room in rooms:
            prefill.ask(prompt, room)
        for answer, n in zip(answers, n_new, strict=True):
            answer.wait()
            assert answer.tokens == plain(model_of(), prompt, n)
        assert decode.role.counts.received == 2


def test_another_prefill_node_is_served_what_the_decode_node_generated(tmp_path: Path) -> None:
    """Full HiCache with async offload: storage is all that the second prefill half shares."""
    storage = {
        "hicache_storage_backend": "file",
        "extra": {"path": str(tmp_path)},
        "hicache_size": 0,
    }
    prompt = prompt_of(22)
    with ExitStack() as stack:
        decode = stack.enter_context(half("decode", storage, offload_stride=1))
        first = stack.enter_context(half("prefill", storage))
        room = room_at(first)
        first.ask(prompt, room)
        _, answer = decode.ask(prompt, room, n_new=20)
        answer.wait()
        history = [*prompt, *answer.tokens]
        assert decode.engine.call(lambda cache: cache.flush(20.0), 30.0)

        second = stack.enter_context(half("prefill", storage))
        longer = history + prompt_of(5, seed=3)
        room = room_at(second)
        _, computing = second.ask(longer, room)
        _, answer = decode.ask(longer, room)
        last = answer.wait()
        assert answer.tokens == plain(model_of(), longer, 12)
        n_stored = (len(history) - 1) // PAGE_SIZE * PAGE_SIZE  # the last token was never computed
        assert computing.wait().cached == last.cached == CachedTokens(storage=n_stored)


def test_the_decode_half_writes_only_what_the_prefill_half_did_not(tmp_path: Path) -> None:
    """And its host memory is free again when everything is stored."""
    storage = {"hicache_storage_backend": "file", "extra": {"path": str(tmp_path)}}
    offloading = {**storage, "hicache_host_retention": "free_once_stored"}
    prompt = prompt_of(22)
    with ExitStack() as stack:
        decode = stack.enter_context(half("decode", offloading, offload_stride=1))
        prefill = stack.enter_context(half("prefill", storage))
        room = room_at(prefill)
        prefill.ask(prompt, None, n_new=1)[1].wait()
        assert prefill.engine.call(lambda cache: cache.flush(20.0), 30.0)
        prefill.ask(prompt, room)
        _, answer = decode.ask(prompt, room, n_new=20)
        answer.wait()
        assert decode.engine.call(lambda cache: cache.flush(20.0), 30.0)
        snapshot = decode.engine.cache.snapshot()
        n_pages = (len(prompt) + 20 - 1) // PAGE_SIZE
        assert snapshot.counters["store_skipped_pages"] == len(prompt) // PAGE_SIZE
        assert snapshot.counters["stored_pages"] == n_pages - len(prompt) // PAGE_SIZE
        assert snapshot.host is not None
        assert snapshot.host.used_pages == 0


def test_a_prompt_that_nobody_stored_is_stored_by_the_decode_half(tmp_path: Path) -> None:
    """However short the answer is."""
    storage = {"hicache_storage_backend": "file", "extra": {"path": str(tmp_path)}}
    prompt = prompt_of(22)
    with half("decode", storage, offload_stride=1) as decode, half("prefill") as prefill:
        room = room_at(prefill)
        prefill.ask(prompt, room)
        _, answer = decode.ask(prompt, room, n_new=2)
        answer.wait()
        assert decode.engine.call(lambda cache: cache.flush(20.0), 30.0)
        counters = decode.engine.cache.snapshot().counters
        assert counters["stored_pages"] == (len(prompt) + 2 - 1) // PAGE_SIZE
        assert counters["store_skipped_pages"] == 0


def test_a_mode_that_is_none_is_an_error() -> None:
    with pytest.raises(ConfigError, match="mode 'both' is none of: prefill, decode"):
        Role(RoleSettings("both"))
