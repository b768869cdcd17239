"""Rules of a chain: the nearest link that has a page serves it, and a dead link costs nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
from pydantic import ValidationError

from hicache_core.config.messages import config_error
from hicache_core.errors import (
    BackendDenied,
    BackendError,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
    BreakerOpen,
    ConfigError,
)
from hicache_core.storage.base import (
    Clearable,
    Flushable,
    Listable,
    Pins,
    RegistersMemory,
    ReportsUsage,
    StorageBackend,
)
from hicache_core.storage.chain.backend import ChainBackend
from hicache_core.storage.chain.capabilities import Link
from hicache_core.storage.chain.config import ChainConfig
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.testing.harness import required
from tests.unit.storage.virtual import (
    CONTEXT,
    NBYTES,
    Clock,
    MakeChain,
    Told,
    blank,
    content,
    filled,
    key,
    make_worker,
)

KEYS = [key(n) for n in range(8)]
ERRORS = [BackendUnavailable("gone"), BackendTimeout("late"), BreakerOpen("open")]


@pytest.fixture
def stores() -> list[Told]:
    return [Told(Clock()) for _ in range(3)]


def hold(store: Told, *numbers: int) -> None:
    store.objects = {KEYS[n]: content(KEYS[n]) for n in numbers}


def stuck(store: Told) -> Iterator[None]:
    """From now on calls of ``store`` wait until the iterator is continued."""
    store.inside, store.may_go = threading.Event(), threading.Event()
    yield
    store.inside = None
    store.may_go.set()
    yield


def test_a_page_is_served_by_the_nearest_link_that_has_it(
    stores: list[Told], make: MakeChain
) -> None:
    hold(stores[0], 0, 1, 5)
    hold(stores[1], 2, 3, 4)
    hold(stores[2], 0, 1, 2, 6)
    chain = make(stores, promote=False)
    assert chain.batch_exists(KEYS) == 7
    pages = blank(8)
    assert chain.batch_get(KEYS, pages) == 7
    assert pages[:7] == filled(KEYS[:7])
    assert chain.get(KEYS[6]) == content(KEYS[6])
    assert chain.get(KEYS[7]) is None
    assert [chain.exists(name) for name in KEYS[6:]] == [True, False]
    for store in stores:
        assert all(value == content(name) for name, value in store.objects.items())


def test_a_full_hit_of_the_first_link_asks_no_other(stores: list[Told], make: MakeChain) -> None:
    hold(stores[0], *range(8))
    chain = make(stores)
    assert chain.batch_exists(KEYS) == 8
    assert chain.batch_get(KEYS, blank(8)) == 8
    assert [store.n_calls for store in stores] == [2, 0, 0]


def test_pages_of_a_lower_link_are_copied_into_those_above(
    stores: list[Told], make: MakeChain
) -> None:
    hold(stores[0], 0)
    hold(stores[2], 0, 1, 2)
    chain = make(stores)
    pages = blank(3)
    assert chain.batch_get(KEYS[:3], pages) == 3
    for page in pages:
        page[0][:] = b"reused!!"
    chain.settle()
    for store in stores[:2]:
        assert {k: store.objects[k] for k in KEYS[1:3]} == {k: content(k) for k in KEYS[1:3]}
    assert KEYS[0] not in stores[1].objects, "it came from the first link"
    assert chain.copy_counts()["near_promoted_pages"] == 2


def test_promotion_is_bounded_and_counts_what_it_drops(stores: list[Told], make: MakeChain) -> None:
    hold(stores[1], *range(8))
    chain = make(stores[:2], max_promote_nbytes=3 * NBYTES)
    assert chain.batch_get(KEYS, blank(8)) == 8
    chain.settle()
    assert sorted(stores[0].objects) == KEYS[:3]
    assert chain.copy_counts()["near_promoted_dropped_pages"] == 5


def test_through_writes_all_links_before_it_answers(stores: list[Told], make: MakeChain) -> None:
    chain = make(stores)
    assert chain.batch_set(KEYS, filled(KEYS)) == 8
    assert all(sorted(store.objects) == KEYS for store in stores)
    stores[1].room = 8
    more = [key(n) for n in range(6, 12)]
    assert chain.batch_set(more, filled(more)) == 2, "a full link is a link that has not the page"
    chain.set(KEYS[0], content(KEYS[0]))
    with pytest.raises(BackendFull):
        chain.set(more[-1], content(more[-1]))


def test_behind_answers_when_the_first_link_has_it_and_flush_waits_for_the_others(
    stores: list[Told], make: MakeChain
) -> None:
    chain = make(stores[:2], write="behind")
    waiting = stuck(stores[1])
    next(waiting)
    pages = filled(KEYS[:2])
    assert chain.batch_set(KEYS[:2], pages) == 2
    for page in pages:
        page[0][:] = b"reused!!"
    assert stores[1].objects == {}
    assert not chain.flush(0.01)
    assert chain.copy_counts()["middle_behind_nbytes_in_flight"] == 2 * NBYTES
    next(waiting)
    assert chain.flush(20)
    assert stores[1].objects == {name: content(name) for name in KEYS[:2]}


def test_behind_is_bounded_counts_what_it_drops_and_flush_says_so_once(
    stores: list[Told], make: MakeChain
) -> None:
    chain = make(stores[:2], write="behind", max_behind_nbytes=2 * NBYTES)
    assert chain.batch_set(KEYS[:3], filled(KEYS[:3])) == 3
    assert not chain.flush(20)
    assert chain.flush(20)
    stores[1].errors = [BackendUnavailable("gone")]
    assert chain.batch_set(KEYS[3:4], filled(KEYS[3:4])) == 1
    assert not chain.flush(20)
    assert sorted(stores[1].objects) == KEYS[:2]
    assert chain.copy_counts()["middle_behind_dropped_pages"] == 2


def test_opening_an_open_chain_loses_no_thread(make: MakeChain, stores: list[Told]) -> None:
    """``make`` looks at the threads at the end."""
    chain = make(stores, write="behind")
    assert chain.batch_set(KEYS[:1], filled(KEYS[:1])) == 1
    chain.open()
    assert chain.batch_set(KEYS[1:2], filled(KEYS[1:2])) == 1
    assert chain.flush(10.0)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_dead_link_is_passed_over(
    stores: list[Told], make: MakeChain, error: BackendError, dead: int
) -> None:
    for store in stores:
        hold(store, 0, 1)
    stores[dead].always = error
    chain = make(stores)
    assert chain.batch_exists(KEYS) == 2
    pages = blank(2)
    assert chain.batch_get(KEYS[:2], pages) == 2
    assert pages == filled(KEYS[:2])
    assert chain.batch_set(KEYS, filled(KEYS)) == 8
    assert chain.get(KEYS[0]) == content(KEYS[0])
    chain.set(KEYS[0], content(KEYS[0]))
    for n, store in enumerate(stores):
        assert (KEYS[7] in store.objects) == (n != dead)


def test_behind_writes_the_first_link_that_answers(stores: list[Told], make: MakeChain) -> None:
    chain = make(stores, write="behind")
    stores[0].always = BackendUnavailable("gone")
    assert chain.batch_set(KEYS, filled(KEYS)) == 8
    assert sorted(stores[1].objects) == KEYS
    assert chain.flush(20)
    assert sorted(stores[2].objects) == KEYS


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ([BreakerOpen("a"), BreakerOpen("b")], BreakerOpen),
        ([BackendTimeout("a"), BackendTimeout("b")], BackendTimeout),
        ([BackendDenied("a"), BackendTimeout("b")], BackendUnavailable),
        ([BreakerOpen("a"), BackendUnavailable("b")], BackendUnavailable),
        ([ConnectionResetError("a"), OSError("b")], BackendUnavailable),
    ],
)
def test_when_no_link_answers_that_is_raised_and_names_each(
    stores: list[Told], make: MakeChain, errors: list[OSError], kind: type[BackendError]
) -> None:
    chain = make(stores[:2])
    for store, error in zip(stores, errors, strict=False):
        store.always = error
    calls: list[Callable[[], object]] = [
        lambda: chain.batch_exists(KEYS),
        lambda: chain.batch_get(KEYS, blank(8)),
        lambda: chain.batch_set(KEYS, filled(KEYS)),
        lambda: chain.get(KEYS[0]),
        lambda: chain.set(KEYS[0], b"x"),
        lambda: chain.exists(KEYS[0]),
        lambda: chain.delete(KEYS),
    ]
    for call in calls:
        with pytest.raises(BackendError, match=r"near: \w+: .*; middle: ") as caught:
            call()
        assert type(caught.value) is kind


def test_what_some_links_have_is_answered_even_if_another_fails_after_it(
    stores: list[Told], make: MakeChain
) -> None:
    hold(stores[0], 0, 1)
    stores[1].always = BackendUnavailable("gone")
    chain = make(stores[:2])
    assert chain.batch_exists(KEYS) == 2
    assert chain.batch_get(KEYS, blank(8)) == 2
    assert chain.batch_exists(KEYS[2:]) == 0


def test_a_bug_in_a_link_is_not_mistaken_for_a_dead_link(
    stores: list[Told], make: MakeChain
) -> None:
    stores[0].errors = [KeyError("bug")]
    with pytest.raises(KeyError):
        make(stores).batch_exists(KEYS)


@pytest.mark.parametrize("answer", [-1, 9])
def test_an_answer_that_is_no_count_is_refused(
    stores: list[Told], make: MakeChain, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    monkeypatch.setattr(stores[0], "batch_exists", lambda _: answer)
    with pytest.raises(ValueError, match=f"near answered {answer} of 8 pages"):
        make(stores).batch_exists(KEYS)


def test_delete_leaves_no_copy_behind_not_even_one_under_way(
    stores: list[Told], make: MakeChain
) -> None:
    chain = make(stores[:2], write="behind")
    waiting = stuck(stores[1])
    next(waiting)
    chain.batch_set(KEYS, filled(KEYS))
    deleting = threading.Thread(target=lambda: chain.delete(KEYS[:4]))
    deleting.start()
    next(waiting)
    deleting.join(20)
    assert sorted(stores[0].objects) == sorted(stores[1].objects) == KEYS[4:]


def test_a_delete_that_one_link_could_not_do_is_a_failure(
    stores: list[Told], make: MakeChain
) -> None:
    chain = make(stores[:2])
    chain.batch_set(KEYS, filled(KEYS))
    stores[0].errors = [BackendUnavailable("gone")]
    with pytest.raises(BackendUnavailable, match="near"):
        chain.delete(KEYS)
    assert stores[1].objects == {}, "the others did it"
    stores[1].errors = [NotImplementedError("cannot")]  # type: ignore[list-item]
    with pytest.raises(NotImplementedError):
        chain.delete(KEYS)
    assert stores[0].objects == {}


class Rich(Told):
    """Can do what only some can."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.registered: list[memoryview] = []
        self.pinned: list[str] = []

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        self.registered += buffers

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        self._call()
        self.pinned += keys
        return sum(name in self.objects for name in keys)

    def usage(self) -> dict[str, int]:
        self._call()
        return {"0" * 16: NBYTES * len(self.objects)}

    def clear(self, prefix: str) -> int:
        self._call()
        n = len(self.objects)
        self.objects = {}
        return n

    def flush(self, timeout_s: float) -> bool:
        return timeout_s > 1


def test_a_chain_can_do_what_any_of_its_links_can(stores: list[Told], make: MakeChain) -> None:
    plain = make(stores[:2])
    assert plain.capability(Listable) is not None
    assert plain.capability(Flushable) is plain
    for kind in (RegistersMemory, Pins, ReportsUsage, Clearable):
        assert plain.capability(kind) is None, kind
    rich = Rich(Clock())
    chain = make([stores[0], rich])
    memory = memoryview(bytearray(8))
    required(chain, RegistersMemory).register_memory([memory])
    assert rich.registered == [memory]
    chain.batch_set(KEYS, filled(KEYS))
    pins, reports = required(chain, Pins), required(chain, ReportsUsage)
    assert pins.pin(KEYS, 5.0) == 8
    assert reports.usage() == {"0" * 16: 8 * NBYTES}
    assert sorted(required(chain, Listable).list_keys("")) == KEYS, "each once"
    assert chain.flush(20)
    assert not chain.flush(0.5), "that of the link ran out"
    rich.always = BackendUnavailable("gone")
    assert (pins.pin(KEYS, 5.0), reports.usage()) == (0, {})
    rich.always = None
    assert required(chain, Clearable).clear("") == 8


def test_a_link_that_does_not_open_closes_those_that_did(stores: list[Told]) -> None:
    closed: list[str] = []
    stores[0].close = lambda: closed.append("near")  # type: ignore[method-assign]

    def fail() -> None:
        raise BackendUnavailable("connection refused")

    stores[1].open = fail  # type: ignore[method-assign]
    config = ChainConfig.model_validate({"links": [{"backend": "a"}, {"backend": "b"}]})
    links = [Link("near", stores[0]), Link("far", stores[1])]
    with pytest.raises(BackendUnavailable):
        ChainBackend(config, CONTEXT, links, make_worker).open()
    assert closed == ["near"]


def test_close_is_bounded_and_counts_what_it_abandons(
    stores: list[Told], make: MakeChain, caplog: pytest.LogCaptureFixture
) -> None:
    chain = make(stores[:2], write="behind", settle_s=0.05)
    waiting = stuck(stores[1])
    next(waiting)
    chain.batch_set(KEYS[:2], filled(KEYS[:2]))
    assert stores[1].inside is not None
    assert stores[1].inside.wait(20)
    chain.batch_set(KEYS[2:5], filled(KEYS[2:5]))
    closed: list[int] = []
    for n, store in enumerate(stores[:2]):
        store.close = partial(closed.append, n)  # type: ignore[method-assign]
    chain.close()
    assert closed == [0], "a link with a call inside stays open"
    assert "still storing 2 copied pages" in caplog.text
    assert chain.copy_counts()["middle_behind_dropped_pages"] == 3
    next(waiting)


def test_guarded_and_sealed_links_exchange_sealed_pages(make: MakeChain) -> None:
    """Copies keep the header segment, and each link seals its own."""
    clock = Clock()
    inner = [Told(clock) for _ in range(2)]
    for store in inner:
        store.batch_get = StorageBackend.batch_get.__get__(store)  # type: ignore[method-assign]
    links = [GuardedBackend(SealedBackend(store), GuardConfig(), clock) for store in inner]
    chain = make(links, write="behind")

    def page(payload: bytes) -> list[memoryview]:
        return [memoryview(bytearray(HEADER_NBYTES)), memoryview(bytearray(payload))]

    assert chain.batch_set(KEYS[:2], [page(b"one"), page(b"two")]) == 2
    assert chain.flush(20)
    assert inner[0].objects == inner[1].objects
    assert len(inner[0].objects[KEYS[0]]) == HEADER_NBYTES + 3
    damaged = bytearray(inner[0].objects[KEYS[0]])
    damaged[-1] ^= 1
    inner[0].objects[KEYS[0]] = bytes(damaged)
    target = [page(b"---"), page(b"---")]
    assert chain.batch_get(KEYS[:2], target) == 2, "the damaged page comes from the other link"
    assert [bytes(p[1]) for p in target] == [b"one", b"two"]
    chain.settle()
    assert inner[0].objects == inner[1].objects, "and is healed by promotion"


def test_a_hanging_link_opens_its_guard_and_the_next_call_passes_it_over(make: MakeChain) -> None:
    clock = Clock()
    near, far = Told(clock), Told(clock)
    for store in (near, far):
        hold(store, 0, 1)
    chain = make([GuardedBackend(near, GuardConfig(), clock), far])
    waiting = stuck(near)
    next(waiting)
    first = blank(2)
    reading = threading.Thread(target=lambda: chain.batch_get(KEYS[:2], first))
    reading.start()
    assert near.inside is not None
    assert near.inside.wait(20)
    clock.now += 5
    pages = blank(2)
    assert chain.batch_get(KEYS[:2], pages) == 2
    assert pages == filled(KEYS[:2])
    assert first == blank(2), "nobody else touches the pages of a call that has not come back"
    next(waiting)
    reading.join(20)
    assert first == filled(KEYS[:2])


def test_a_wrong_setting_of_a_link_is_explained_by_the_settings_of_a_link() -> None:
    def message(links: object) -> str:
        with pytest.raises(ValidationError) as caught:
            ChainConfig.model_validate({"links": links})
        return str(config_error(caught.value, ChainConfig, prefix="chain."))

    assert message([{"backend": "memory", "nam": "x"}]) == (
        "chain.links.0.nam: unknown setting; did you mean 'name'?"
    )
    assert message([{"backend": "memory", "guard": {"retrys": 1}}]) == (
        "chain.links.0.guard.retrys: unknown setting; did you mean 'retries'?"
    )
    assert message([{}]).startswith(
        "chain.links.0.backend: this setting is required (name of the backend"
    )
    assert message([]).startswith("chain.links = []: ")
    assert message([{"backend": "memory"}] * 2).startswith("chain: two links are named 'memory'")


def test_settings_of_a_chain_are_checked() -> None:
    twice = {"links": [{"backend": "memory"}, {"backend": "memory"}]}
    with pytest.raises(ValidationError, match="two links are named 'memory'"):
        ChainConfig.model_validate(twice)
    with pytest.raises(ValidationError):
        ChainConfig.model_validate({"links": []})
    with pytest.raises(ValidationError):
        ChainConfig.model_validate({"links": [{"backend": "memory"}], "write": "sideways"})
    config = ChainConfig.model_validate(
        {
            "links": [
                {"backend": "redis", "config": {"password": "hush"}, "guard": {"retries": 0}},
                {"backend": "s3", "name": "archive"},
            ],
            "max_behind_nbytes": "1GiB",
        }
    )
    assert [link.label for link in config.links] == ["redis", "archive"]
    assert (config.links[0].guard.retries, config.max_behind_nbytes) == (0, 2**30)
    assert "hush" not in repr(config)
    assert all(field.description for field in ChainConfig.model_fields.values())
    with pytest.raises(ConfigError, match="different names"):
        ChainBackend(config, CONTEXT, [], make_worker)
