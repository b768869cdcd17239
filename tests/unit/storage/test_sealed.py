"""Rules of sealed pages: bytes that do not verify are a counted miss."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.errors import BackendFull, BackendUnavailable
from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend, seal
from hicache_core.storage.segments import nbytes_of, scatter
from hicache_core.types import BackendContext, Page

NAMESPACE = "0123456789abcdef"
KEY = f"{NAMESPACE}/{'5a' * 32}"
OTHER_PAGE = f"{NAMESPACE}/{'5b' * 32}"
OTHER_NAMESPACE = f"{'f' * 16}/{'5a' * 32}"
CONTEXT = BackendContext(namespace=NAMESPACE)


def store() -> tuple[SealedBackend, MemoryBackend]:
    inner = MemoryBackend(MemoryConfig(), CONTEXT)
    sealed = SealedBackend(inner)
    sealed.open()
    return sealed, inner


def page(*segments: bytes) -> list[memoryview]:
    """A page of these payload segments behind an empty header."""
    return [memoryview(bytearray(part)) for part in (bytes(HEADER_NBYTES), *segments)]


def read(sealed: SealedBackend, nbytes: int, key: str = KEY) -> bytes | None:
    """The payload under ``key``, or None."""
    into = page(bytes(nbytes))
    return bytes(into[1]) if sealed.batch_get([key], [into]) == 1 else None


def rejected(sealed: SealedBackend) -> dict[str, float]:
    """What was refused: the counts that are not 0."""
    return {
        name.removeprefix("sealed_"): count
        for name, count in sealed.stats().items()
        if name.startswith("sealed_") and count
    }


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(0, 240))
def test_a_page_verifies_however_it_is_cut_into_segments(parts: list[bytes], cut: int) -> None:
    sealed, _ = store()
    payload = b"".join(parts)
    assert sealed.batch_set([KEY], [page(*parts)]) == 1
    assert read(sealed, len(payload)) == payload
    into = page(payload[:cut], payload[cut:])
    assert sealed.batch_get([KEY], [into]) == 1
    assert b"".join(into[1:]) == payload
    assert rejected(sealed) == {}


def test_the_stored_object_is_the_documented_header_and_the_payload() -> None:
    sealed, inner = store()
    sealed.batch_set([KEY], [page(b"pay", b"load")])
    header = struct.pack(
        "<4sHHQQ8s32s",
        b"HiCP",
        1,
        0,
        7,
        xxhash.xxh3_64_intdigest(b"payload"),
        bytes.fromhex(NAMESPACE),
        b"\x5a" * 32,
    )
    assert inner.get(KEY) == header + b"payload"


def test_get_and_set_deal_in_payloads_of_the_same_objects() -> None:
    sealed, _ = store()
    sealed.set(KEY, b"payload")
    assert bytes(sealed.get(KEY) or b"") == b"payload"
    assert read(sealed, 7) == b"payload"
    assert sealed.exists(KEY)
    assert sealed.get(OTHER_PAGE) is None


@given(st.integers(0, (HEADER_NBYTES + 16) * 8 - 1))
def test_any_flipped_bit_is_a_counted_miss_and_the_object_goes(bit: int) -> None:
    sealed, inner = store()
    sealed.batch_set([KEY], [page(bytes(range(16)))])
    value = bytearray(inner.get(KEY) or b"")
    value[bit // 8] ^= 1 << bit % 8
    inner.set(KEY, value)
    assert read(sealed, 16) is None
    assert sum(rejected(sealed).values()) == 1
    assert not inner.exists(KEY)


@pytest.mark.parametrize(
    ("at", "form", "value", "kind"),
    [
        (0, "4s", b"JPEG", "corrupt"),
        (4, "<H", 2, "wrong_version"),
        (6, "<H", 1, "wrong_version"),
        (8, "<Q", 15, "wrong_length"),
        (16, "<Q", 0, "corrupt"),
        (24, "8s", b"\xff" * 8, "foreign"),
        (32, "32s", b"\xff" * 32, "foreign"),
        (70, "1s", b"\xff", "corrupt"),
    ],
)
def test_each_kind_of_mismatch_is_counted_as_such(
    at: int, form: str, value: int | bytes, kind: str
) -> None:
    sealed, inner = store()
    sealed.batch_set([KEY], [page(bytes(range(16)))])
    data = bytearray(inner.get(KEY) or b"")
    struct.pack_into(form, data, at, value)
    gets: list[Callable[[], object]] = [lambda: read(sealed, 16), lambda: sealed.get(KEY)]
    for get in gets:
        inner.set(KEY, data)
        assert get() is None
        assert not inner.exists(KEY)
    assert rejected(sealed) == {kind: 2}


@pytest.mark.parametrize("key", [OTHER_PAGE, OTHER_NAMESPACE])
def test_an_object_of_another_key_is_foreign(key: str) -> None:
    sealed, inner = store()
    sealed.batch_set([KEY], [page(b"payload")])
    inner.set(key, inner.get(KEY) or b"")
    assert read(sealed, 7, key) is None
    assert rejected(sealed) == {"foreign": 1}
    assert read(sealed, 7) == b"payload"


@pytest.mark.parametrize("nbytes", [0, 6, 8])
def test_an_object_of_another_length_is_a_miss_and_makes_room_for_a_good_one(nbytes: int) -> None:
    sealed, inner = store()
    sealed.batch_set([KEY], [page(b"payload")])
    assert read(sealed, nbytes) is None
    assert rejected(sealed) == {"wrong_length": 1}
    assert not inner.exists(KEY)


def test_a_missing_object_is_no_mismatch() -> None:
    sealed, _ = store()
    assert read(sealed, 7) is None
    assert rejected(sealed) == {}


@pytest.mark.parametrize("bad", range(4))
def test_the_count_ends_before_the_first_page_that_does_not_verify(bad: int) -> None:
    sealed, inner = store()
    keys = [f"{NAMESPACE}/{n:064x}" for n in range(4)]
    sealed.batch_set(keys, [page(b"payload") for _ in keys])
    inner.set(keys[bad], bytes(HEADER_NBYTES + 7))
    assert sealed.batch_get(keys, [page(bytes(7)) for _ in keys]) == bad
    assert sealed.batch_exists(keys) == bad


@pytest.mark.parametrize(
    "key", ["", "k", KEY.upper(), KEY + "0", KEY[:-1], " " + KEY[1:], KEY.replace("/", "-"), "/"]
)
def test_a_key_of_another_form_is_an_error_at_the_edge(key: str) -> None:
    sealed, _ = store()
    calls: list[Callable[[], object]] = [
        lambda: sealed.get(key),
        lambda: sealed.set(key, b"x"),
        lambda: sealed.exists(key),
        lambda: sealed.batch_exists([KEY, key]),
        lambda: sealed.batch_get([key], [page(b"x")]),
        lambda: sealed.batch_set([key], [page(b"x")]),
        lambda: sealed.exists_each([KEY, key]),
        lambda: sealed.get_each([key], [page(b"x")]),
        lambda: sealed.set_each([key], [page(b"x")]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="not a page key"):
            call()


@pytest.mark.parametrize("segments", [[], [b"payload"], [bytes(63), b"x"]])
def test_a_page_without_a_header_segment_is_an_error(segments: list[bytes]) -> None:
    sealed, _ = store()
    for store_page in (sealed.batch_set, sealed.set_each):
        with pytest.raises(ValueError, match="64 bytes"):
            store_page([KEY], [[memoryview(bytearray(part)) for part in segments]])


class BadLink(MemoryBackend):
    """Flips a bit of each object that is read while ``flips`` lasts, another one each time."""

    flips = 0

    def get(self, key: str) -> Buffer | None:
        value = super().get(key)
        if value is None or not self.flips:
            return value
        self.flips -= 1
        spoilt = bytearray(value)
        spoilt[-1 - self.flips % 4] ^= 1
        return spoilt


@pytest.mark.parametrize("flips", [1, 2, 3])
def test_what_differs_between_two_reads_stays_and_is_a_hit_if_the_second_is_good(
    flips: int,
) -> None:
    inner = BadLink(MemoryConfig(), CONTEXT)
    sealed = SealedBackend(inner)
    sealed.open()
    keys = [f"{NAMESPACE}/{n:064x}" for n in range(3)]
    sealed.batch_set(keys, [page(b"payload") for _ in keys])
    inner.flips = flips
    value = sealed.get(keys[0])
    assert (value is not None) == (flips == 1)
    assert value is None or bytes(value) == b"payload"
    inner.flips = 0
    assert sealed.batch_exists(keys) == 3
    assert sum(rejected(sealed).values()) == (flips > 1)


def test_a_batch_goes_on_behind_a_page_that_is_good_at_the_second_read() -> None:
    inner = BadLink(MemoryConfig(), CONTEXT)
    sealed = SealedBackend(inner)
    sealed.open()
    keys = [f"{NAMESPACE}/{n:064x}" for n in range(3)]
    sealed.batch_set(keys, [page(b"payload") for _ in keys])
    inner.flips = 1
    into = [page(bytes(7)) for _ in keys]
    assert sealed.batch_get(keys, into) == 3
    assert [bytes(segments[1]) for segments in into] == [b"payload"] * 3


class ReadOnlyStore(MemoryBackend):
    """Cannot delete."""

    def delete(self, keys: Sequence[str]) -> None:
        StorageBackend.delete(self, keys)


def test_a_mismatch_is_a_miss_where_nothing_can_be_deleted() -> None:
    inner = ReadOnlyStore(MemoryConfig(), CONTEXT)
    sealed = SealedBackend(inner)
    sealed.open()
    inner.set(KEY, bytes(HEADER_NBYTES + 7))
    assert read(sealed, 7) is None
    assert read(sealed, 7) is None
    assert rejected(sealed) == {"corrupt": 2}


class Broken(StorageBackend):
    """Raises in every method."""

    name = "broken"

    def get(self, key: str) -> Buffer | None:
        raise BackendUnavailable("no route to the store")

    def exists(self, key: str) -> bool:
        raise BackendUnavailable("no route to the store")

    def set(self, key: str, value: Buffer) -> None:
        raise BackendUnavailable("no route to the store")


def test_failures_of_the_store_pass_through() -> None:
    sealed = SealedBackend(Broken(BackendConfig(), CONTEXT))
    for call in (
        lambda: sealed.get(KEY),
        lambda: sealed.set(KEY, b"x"),
        lambda: sealed.batch_exists([KEY]),
        lambda: sealed.batch_get([KEY], [page(b"x")]),
        lambda: sealed.batch_set([KEY], [page(b"x")]),
        lambda: sealed.exists_each([KEY]),
        lambda: sealed.get_each([KEY], [page(b"x")]),
        lambda: sealed.set_each([KEY], [page(b"x")]),
    ):
        with pytest.raises(BackendUnavailable):
            call()


def test_a_full_store_is_a_smaller_count() -> None:
    inner = MemoryBackend(MemoryConfig(max_nbytes=HEADER_NBYTES + 4), CONTEXT)
    sealed = SealedBackend(inner)
    sealed.open()
    assert sealed.batch_set([KEY, OTHER_PAGE], [page(b"four"), page(b"fives")]) == 1
    with pytest.raises(BackendFull):
        sealed.set(KEY, b"fives")


def test_a_batch_ends_at_an_object_that_has_another_length_at_the_second_read() -> None:
    """Somebody stored it anew between the two reads, for pages of another size."""
    longer = page(b"a longer payload")
    seal(KEY, longer)
    later = b"".join(longer)

    class StoredAnew(MemoryBackend):
        """Gives a damaged object of the right length first, and then another one."""

        def get(self, key: str) -> Buffer | None:
            value, self.value = self.value, later
            return value

        value: bytes = bytes(HEADER_NBYTES + 7)
        get_each = StorageBackend.get_each  # calls ``get``

    for each in (False, True):
        changing = SealedBackend(StoredAnew(MemoryConfig(), CONTEXT))
        changing.open()
        into = [page(bytes(7))]
        if each:
            assert changing.get_each([KEY], into) == [False]
        else:
            assert changing.batch_get([KEY], into) == 0
        assert rejected(changing) == {"wrong_length": 1}


EIGHT = [f"{NAMESPACE}/{n:064x}" for n in range(8)]


class Counted(MemoryBackend):
    """Counts questions; answers each of them for all keys."""

    def __init__(self) -> None:
        super().__init__(MemoryConfig(), CONTEXT)
        self.asked: list[str] = []
        self.dies_after = 1000

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if len(self.asked) > self.dies_after:
            raise BackendUnavailable("gone")

    def get(self, key: str) -> Buffer | None:
        self._ask("get")
        return super().get(key)

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        self._ask("exists_each")
        return [super(Counted, self).exists(key) for key in keys]

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        self._ask("get_each")
        values = [super(Counted, self).get(key) for key in keys]
        fits = [
            value is not None and len(value) == nbytes_of(page)
            for value, page in zip(values, pages, strict=True)
        ]
        for value, page, fit in zip(values, pages, fits, strict=True):
            if fit:
                scatter(value or b"", page)
        return fits


def with_eight(*absent: int) -> tuple[SealedBackend, Counted]:
    inner = Counted()
    sealed = SealedBackend(inner)
    sealed.open()
    keys = [key for n, key in enumerate(EIGHT) if n not in absent]
    assert list(sealed.set_each(keys, [page(b"payload") for _ in keys])) == [True] * len(keys)
    inner.asked.clear()
    return sealed, inner


def test_pages_behind_gaps_are_read_and_checked() -> None:
    sealed, inner = with_eight(0, 3)
    damaged = bytearray(inner.get(EIGHT[5]) or b"")
    damaged[-1] ^= 1
    inner.set(EIGHT[5], damaged)
    assert list(sealed.exists_each(EIGHT)) == [n not in (0, 3) for n in range(8)]
    into = [page(bytes(7)) for _ in EIGHT]
    mask = sealed.get_each(EIGHT, into)
    assert list(mask) == [n not in (0, 3, 5) for n in range(8)]
    assert all(into[n][1] == b"payload" for n, filled in enumerate(mask) if filled)
    assert rejected(sealed) == {"corrupt": 1}
    assert not inner.exists(EIGHT[5])


@pytest.mark.parametrize("flips", [1, 2, 3])
def test_each_page_that_is_refused_gets_a_second_look(flips: int) -> None:
    class BadLinkToEach(BadLink):
        """The calls for several keys call ``get``."""

        get_each = StorageBackend.get_each

    inner = BadLinkToEach(MemoryConfig(), CONTEXT)
    sealed = SealedBackend(inner)
    sealed.open()
    sealed.set_each(EIGHT[::2], [page(b"payload") for _ in EIGHT[::2]])
    inner.flips = flips
    into = [page(bytes(7)) for _ in EIGHT]
    assert list(sealed.get_each(EIGHT, into)) == [n % 2 == 0 for n in range(8)]
    assert all(into[n][1] == b"payload" for n in range(0, 8, 2))
    assert rejected(sealed) == {}


def test_objects_of_a_wrong_length_are_found_among_absent_ones_by_one_question() -> None:
    sealed, inner = with_eight(1, 2, 4)
    inner.set(EIGHT[4], b"short")
    inner.set(EIGHT[7], bytes(HEADER_NBYTES + 8))
    assert list(sealed.get_each(EIGHT, [page(bytes(7)) for _ in EIGHT])) == [
        n not in (1, 2, 4, 7) for n in range(8)
    ]
    assert inner.asked == ["get_each", "exists_each", "get", "get", "get", "get"]
    assert rejected(sealed) == {"wrong_length": 2}
    assert list(inner.exists_each(EIGHT)) == [n not in (1, 2, 4, 7) for n in range(8)]


def test_a_store_that_fails_at_the_second_look_keeps_the_pages_that_were_right() -> None:
    sealed, inner = with_eight(0)
    for n in (2, 5):
        inner.set(EIGHT[n], bytes(HEADER_NBYTES + 7))
    inner.dies_after = 1
    assert list(sealed.get_each(EIGHT, [page(bytes(7)) for _ in EIGHT])) == [
        n not in (0, 2, 5) for n in range(8)
    ]
    assert inner.asked == ["get_each", "get"], "a store that fails is not asked again and again"


def test_a_full_store_takes_what_still_fits() -> None:
    inner = MemoryBackend(MemoryConfig(max_nbytes=HEADER_NBYTES + 4), CONTEXT)
    sealed = SealedBackend(inner)
    sealed.open()
    assert list(sealed.set_each([KEY, OTHER_PAGE], [page(b"fives"), page(b"four")])) == [
        False,
        True,
    ]
    assert bytes(sealed.get(OTHER_PAGE) or b"") == b"four"
