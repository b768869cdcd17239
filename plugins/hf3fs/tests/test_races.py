"""A slot is never reused under a reader; if it were, the reader would answer a miss."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hicache_hf3fs import Hf3fsBackend
from hicache_hf3fs.page_io import PageIO, Transfer
from hicache_hf3fs.posix import PosixIO

from plugins.hf3fs.tests.conftest import Open
from plugins.hf3fs.tests.helpers import hits, key_of, put
from tests.servers.valkey import Valkey


class InterruptedIO(PosixIO):
    """The POSIX mode, with something else happening just before the bytes of a read are fetched."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__(1)
        self._meanwhile = meanwhile

    def read(
        self, transfers: Sequence[Transfer], deadline: float, arrived: Callable[[int], bool]
    ) -> list[int]:
        self._meanwhile()
        return super().read(transfers, deadline, arrived)


def interrupt(backend: Hf3fsBackend, meanwhile: Callable[[], None]) -> None:
    """From now on every read of ``backend`` looks up, lets ``meanwhile`` happen, then reads."""
    with backend._calls.call() as store:
        io: PageIO = InterruptedIO(meanwhile)
        store.io.close()
        store.io = io


@pytest.fixture(params=["sqlite", "redis"])
def two(request: pytest.FixtureRequest, opened: Open, valkey: Valkey) -> Open:
    """Opens backends on one store of two slots."""

    def open_backend(**settings: object) -> Hf3fsBackend:
        url = {"metadata_url": valkey.url} if request.param == "redis" else {}
        return opened(file_size=2 * 4096, mode="posix", **url, **settings)

    return open_backend


def test_a_writer_cannot_take_a_slot_that_is_being_read(two: Open) -> None:
    reader, writer = two(), two()
    put(writer, ["A", "B"])
    dropped = []
    interrupt(reader, lambda: dropped.append(put(writer, ["C", "D"])))
    assert hits(reader, ["A", "B"]) == 2
    assert dropped == [0]


def test_a_deleted_slot_is_not_written_while_it_is_being_read(two: Open) -> None:
    reader, writer = two(), two()
    put(writer, ["A", "B"])
    stored = []

    def meanwhile() -> None:
        with writer._calls.call() as store:  # unbound, but not wiped as delete() would
            store.metadata.delete([key_of("A"), key_of("B")])
        stored.append(put(writer, ["C", "D"]))

    interrupt(reader, meanwhile)
    assert hits(reader, ["A", "B"]) == 0, "bound no longer: not a hit, though the bytes were right"
    assert stored == [0]
    assert reader.stats()["raced_reads"] == 2


def test_a_read_that_outlives_its_lease_is_a_miss_and_never_another_keys_bytes(two: Open) -> None:
    reader, writer = two(lease_s=0.1), two(lease_s=0.1)
    put(writer, ["A", "B"])
    stored = []

    def meanwhile() -> None:
        time.sleep(0.25)
        stored.append(put(writer, ["C", "D"]))

    interrupt(reader, meanwhile)
    assert hits(reader, ["A", "B"]) == 0
    assert stored == [2], "the lease was over: the slots were free to be written"
    assert reader.stats()["late_reads"] == 2
    assert reader.stats()["damaged_slots"] == 0
    assert hits(writer, ["C", "D"]) == 2


def test_without_any_lease_the_second_look_at_the_metadata_still_tells(
    opened: Open, tmp_path: Path
) -> None:
    """As if clocks had jumped: the lease is wiped out, the slot reused while it is read."""
    reader, writer = opened(file_size=4096), opened(file_size=4096)
    put(writer, ["A"])
    stored = []

    def meanwhile() -> None:
        with sqlite3.connect(tmp_path / "kv.index.sqlite") as db:
            db.execute("UPDATE slots SET held_until = 0")
        db.close()
        stored.append(put(writer, ["B"]))

    interrupt(reader, meanwhile)
    assert hits(reader, ["A"]) == 0
    assert stored == [1]
    assert hits(writer, ["B"]) == 1, "the reader has not dropped what is another's now"


def test_what_is_remembered_of_a_key_is_asked_again_if_it_has_changed(opened: Open) -> None:
    """A reader that has read a key looks at it only afterwards; others may have moved it."""
    reader, writer = (opened(file_size=8 * 4096, mode="posix") for _ in range(2))
    put(writer, ["A", "B"])
    assert hits(reader, ["A", "B"]) == 2
    with reader._calls.call() as store:
        before = store.metadata.remembered([key_of("A"), key_of("B")])
        assert before is not None
    writer.delete([key_of("A")])
    put(writer, ["C", "A"])
    assert hits(reader, ["A", "B"]) == 2, "from its new slot"
    with reader._calls.call() as store:
        after = store.metadata.remembered([key_of("A"), key_of("B")])
    assert after is not None
    assert (after[0] != before[0], after[1] == before[1]) == (True, True)
    writer.delete([key_of("B")])
    assert hits(reader, ["A", "B"]) == 1
    assert reader.stats()["misses"] == 1
    assert reader.stats()["raced_reads"] == 0, "that was before the call"
    reader.check_integrity()


def test_nothing_is_remembered_whose_lease_ends_too_soon(opened: Open) -> None:
    reader = opened(file_size=4 * 4096, mode="posix", lease_s=0.2)
    put(reader, ["A"])
    assert hits(reader, ["A"]) == 1
    with reader._calls.call() as store:
        assert store.metadata.remembered([key_of("A"), key_of("B")]) is None
        hits(reader, ["A"])
        assert store.metadata.remembered([key_of("A")]) is not None
        time.sleep(0.25)
        assert store.metadata.remembered([key_of("A")]) is None, "a lease is for twice its time"
    assert hits(reader, ["A"]) == 1
