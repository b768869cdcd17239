"""Why a request missed: each reason, seen as an operator would see it."""

from __future__ import annotations

import uuid
from importlib import resources
from typing import Any

import pytest

from hicache_core.controller import explain
from hicache_core.controller.explain import Explanation, Reason
from hicache_core.kv.keys import pack_tokens
from hicache_core.types import Namespace
from tests.page_path import backends
from tests.page_path.world import PAGE_SIZE, World, ids, opened


def on(worlds: list[World], backend: type[Any], **settings: Any) -> World:
    """A world on a class of ``backends``."""
    storage = {
        "backend_name": backend.name,
        "module_path": "tests.page_path.backends",
        "class_name": backend.__name__,
    } | settings.pop("keys", {})
    return opened(worlds, storage=storage, backend="dynamic", **settings)


def explained(world: World, tokens: list[int], **kwargs: Any) -> Explanation:
    """The record of one more request."""
    world.request(tokens, **kwargs)
    explanation = world.cache.explain(f"request-{world.n_requests}")
    assert explanation is not None
    parts = (
        explanation.device_tokens,
        explanation.host_tokens,
        explanation.storage_tokens,
        explanation.missed_tokens,
    )
    assert sum(parts) == explanation.n_tokens == len(tokens)
    return explanation


def stored(worlds: list[World], n_tokens: int = 33) -> None:
    world = on(worlds, backends.Store)
    world.request(ids(n_tokens))
    assert world.cache.flush(10.0)


def test_each_tier_is_named_with_its_tokens(worlds: list[World]) -> None:
    share = uuid.uuid4().hex
    world = opened(worlds, storage={"share": share})
    assert explained(world, ids(33)).reason is Reason.NEVER_SEEN
    device = explained(world, ids(33))
    assert (device.device_tokens, device.missed_tokens, device.reason) == (32, 1, Reason.NONE)
    world.cache.flush(10.0)
    world.flush_device()
    host = explained(world, ids(33))
    assert (host.host_tokens, host.storage_tokens) == (32, 0)
    world.cache.flush(10.0)
    other = opened(worlds, storage={"share": share})
    storage = explained(other, ids(33))
    assert (storage.host_tokens, storage.storage_tokens, storage.reason) == (0, 32, Reason.NONE)


def test_an_unknown_request_has_no_record(worlds: list[World]) -> None:
    assert opened(worlds).cache.explain("nobody") is None


def test_evicted_says_when_and_from_where(worlds: list[World]) -> None:
    now = [100.0]
    world = opened(worlds, enable_hierarchical_cache=False, clock=lambda: now[0])
    world.request(ids(33))
    world.flush_device()
    now[0] = 112.0
    explanation = explained(world, ids(33))
    assert explanation.reason is Reason.EVICTED
    assert "left the device 12.0 s before" in explanation.detail


def test_a_page_that_left_in_the_middle_of_a_run_is_found_when_somebody_asks(
    worlds: list[World],
) -> None:
    """All eight pages leave at once; a shorter prompt brings four back, and the fifth is missed."""
    world = opened(worlds, enable_hierarchical_cache=False)
    world.request(ids(33))
    world.flush_device()
    world.request(ids(17))
    explanation = explained(world, ids(33))
    assert (explanation.device_tokens, explanation.reason) == (16, Reason.EVICTED)
    assert "left the device" in explanation.detail


@pytest.mark.parametrize("n_before", [0, 17])
def test_what_left_after_a_request_is_no_reason_for_its_miss(
    worlds: list[World], n_before: int
) -> None:
    """Neither where nothing was found, nor where a part was."""
    world = opened(worlds, enable_hierarchical_cache=False)
    if n_before:
        world.request(ids(n_before))
    before = explained(world, ids(33))
    for _ in range(2):
        world.flush_device()
        assert world.cache.explain(before.request_id) == before
        world.request(ids(33))
    assert before.reason is (Reason.NEW_PART if n_before else Reason.NEVER_SEEN)


def test_what_left_before_a_request_stays_its_reason_though_it_leaves_again(
    worlds: list[World],
) -> None:
    world = opened(worlds, enable_hierarchical_cache=False)
    world.request(ids(33))
    world.flush_device()
    world.request(ids(17))
    explanation = explained(world, ids(33))
    for _ in range(3):
        world.flush_device()
        assert world.cache.explain(explanation.request_id) == explanation
        world.request(ids(33))
    assert explanation.reason is Reason.EVICTED


def test_the_next_turn_of_a_conversation_says_where_the_new_part_begins(
    worlds: list[World],
) -> None:
    world = opened(worlds)
    world.request(ids(33))
    explanation = explained(world, ids(49))
    assert (explanation.device_tokens, explanation.reason) == (32, Reason.NEW_PART)
    assert explanation.detail == "the new part, from token 32"


def test_a_prompt_without_a_whole_page_is_too_short_and_not_all_found(worlds: list[World]) -> None:
    explanation = explained(opened(worlds), ids(3))
    assert (explanation.missed_tokens, explanation.reason) == (3, Reason.TOO_SHORT)


def test_a_flush_is_a_reason(worlds: list[World]) -> None:
    world = opened(worlds, enable_hierarchical_cache=False)
    world.request(ids(33))
    assert world.cache.reset()
    explanation = explained(world, ids(33))
    assert explanation.reason is Reason.EVICTED
    assert "(flushed)" in explanation.detail


def test_every_reason_has_its_words_on_the_page() -> None:
    words = resources.files("hicache_core.observe.page") / "files" / "words.js"
    text = words.read_text(encoding="utf-8")
    assert [reason for reason in Reason if f"  {reason.value}: [" not in text] == []


def test_the_memory_of_what_left_is_bounded(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "MAX_GHOST_PAGES", 20)
    world = opened(worlds, enable_hierarchical_cache=False)
    for start in range(0, 10_000, 1000):
        world.request(ids(33, start))
        world.flush_device()
    explainer = world.cache.parts.explainer
    n_pages = sum(len(ghost.digests) // 32 for ghost in explainer._ghosts.values())
    assert n_pages == explainer._n_ghost_pages == 16
    assert explained(world, ids(33, 9000)).reason is Reason.EVICTED
    assert explained(world, ids(33, 0)).reason is Reason.NEVER_SEEN


def test_what_left_before_storage_had_it_is_not_durable(worlds: list[World]) -> None:
    guard = {"guard": {"min_calls": 1000}}  # no breaker, whose word would go first
    world = on(worlds, backends.RaisesOnWrite, device_pages=9, ratio=1.0, keys=guard)
    for start in (0, 1000, 2000):  # each takes both tiers as a whole
        world.request(ids(33, start))
        assert world.cache.flush(10.0)
    explanation = explained(world, ids(33))
    assert explanation.reason is Reason.NOT_DURABLE
    assert "before storage had it" in explanation.detail


def test_below_the_threshold_storage_is_not_asked(worlds: list[World]) -> None:
    stored(worlds)
    world = on(worlds, backends.Store, keys={"prefetch_threshold": 100})
    explanation = explained(world, ids(33))
    assert explanation.reason is Reason.BELOW_THRESHOLD
    assert "100 are the threshold" in explanation.detail


def test_a_store_too_slow_for_the_request_is_a_deadline(worlds: list[World]) -> None:
    stored(worlds)
    world = on(worlds, backends.Gated, hicache_storage_prefetch_policy="best_effort")
    assert explained(world, ids(33)).reason is Reason.DEADLINE


def test_a_store_that_answers_late_and_has_nothing_was_not_too_slow(worlds: list[World]) -> None:
    """Under best_effort a request starts before storage has answered: its answer is heard later."""
    world = on(worlds, backends.Store, hicache_storage_prefetch_policy="best_effort")
    explanation = explained(world, ids(33))
    while explanation.reason is Reason.DEADLINE:
        world.cache.wait(0.01)
        world.cache.poll()
        found = world.cache.explain(explanation.request_id)
        assert found is not None
        explanation = found
    assert explanation.reason is Reason.NEVER_SEEN


def test_a_store_that_fails_is_a_storage_error_with_its_words(worlds: list[World]) -> None:
    stored(worlds)
    explanation = explained(on(worlds, backends.RaisesOnRead), ids(33))
    assert explanation.reason is Reason.STORAGE_ERROR
    assert "lost in the middle" in explanation.detail


def test_a_store_that_is_not_asked_any_more_is_an_open_breaker(worlds: list[World]) -> None:
    world = on(worlds, backends.Raises)
    while (explanation := explained(world, ids(33))).reason is Reason.STORAGE_ERROR:
        assert world.cache.flush(10.0)
        assert world.cache.reset()
    assert explanation.reason is Reason.BREAKER_OPEN
    assert "the next probe is due in" in explanation.detail


def test_what_vanished_between_question_and_read_is_named(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(worlds)
    monkeypatch.setattr(backends.EvictsBeforeRead, "n_kept", 2)
    explanation = explained(on(worlds, backends.EvictsBeforeRead), ids(33))
    assert (explanation.reason, explanation.storage_tokens) == (Reason.VANISHED, 2 * PAGE_SIZE)


def test_a_damaged_page_is_named_corrupt(worlds: list[World]) -> None:
    stored(worlds)
    for key, value in backends.Store.objects.items():
        damaged = bytearray(value)
        damaged[-1] ^= 1
        backends.Store.objects[key] = bytes(damaged)
    assert explained(on(worlds, backends.Store), ids(33)).reason is Reason.CORRUPT


def test_a_host_without_room_is_named(worlds: list[World]) -> None:
    stored(worlds)
    world = on(worlds, backends.Store, device_pages=16, ratio=0.25)
    explanation = explained(world, ids(33))
    assert (explanation.reason, explanation.storage_tokens) == (Reason.NO_ROOM, 16)


@pytest.mark.parametrize("field", ["cache_salt", "extra_key", "lora_id"])
def test_another_namespace_is_named_by_its_field(worlds: list[World], field: str) -> None:
    world = opened(worlds)
    world.request(ids(33))
    world.salt = Namespace(**{field: "another"})
    explanation = explained(world, ids(33))
    assert explanation.reason is Reason.OTHER_NAMESPACE
    assert field in explanation.detail
    assert "another" not in explanation.detail.replace("with another", "")  # never its value


def test_only_the_last_thousand_requests_are_kept(worlds: list[World]) -> None:
    cache = opened(worlds).cache
    for n in range(1030):
        cache.match_prefix(pack_tokens([n]), request_id=str(n))
    assert cache.explain("5") is None
    assert cache.explain("1029") is not None
    assert len(cache.parts.explainer.request_ids) == 1024


def test_without_the_explainer_nothing_is_kept(worlds: list[World]) -> None:
    world = opened(worlds, hicache_explain=False)
    world.request(ids(33))
    assert world.cache.explain("request-1") is None
