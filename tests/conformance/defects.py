"""Wrong backends: each has one defect, and its docstring begins with the rule that finds it."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar, cast

from hicache_core.storage.base import Buffer, Finding, Listable, Pins
from hicache_core.types import Page
from tests.conformance.right import RichBackend, RightBackend

C = TypeVar("C")

END_OF_TESTS = threading.Event()
_RACED_NBYTES = 16 << 10  # objects of this length are those of the races


class OpenStartsAnew(RightBackend):
    """open_twice"""

    def open(self) -> None:
        if self.is_open:
            self.objects.clear()
        super().open()


class SecondCloseRaises(RightBackend):
    """close_twice"""

    def close(self) -> None:
        if not self.is_open:
            raise AttributeError("no connection to close")
        super().close()


class WorksAfterClose(RightBackend):
    """use_after_close"""

    def exists(self, key: str) -> bool:
        return self.is_open and key in self.objects


class LeavesDescriptor(RightBackend):
    """close_releases"""

    def open(self) -> None:
        super().open()
        DESCRIPTORS.append(os.open("/dev/null", os.O_RDONLY))


class LeavesThread(RightBackend):
    """close_releases"""

    def open(self) -> None:
        super().open()
        threading.Thread(target=END_OF_TESTS.wait, daemon=True).start()


DESCRIPTORS: list[int] = []


class _LeaksBySet(RightBackend):
    n_sets = 0

    def set(self, key: str, value: Buffer) -> None:
        super().set(key, value)
        self.n_sets += 1
        self.leak()

    def leak(self) -> None:
        raise NotImplementedError


class LeaksDescriptors(_LeaksBySet):
    """no_leaks"""

    def leak(self) -> None:
        if self.n_sets % 20 == 0:
            DESCRIPTORS.append(os.open("/dev/null", os.O_RDONLY))


class LeaksThreads(_LeaksBySet):
    """no_leaks"""

    def leak(self) -> None:
        if self.n_sets % 40 == 0:
            threading.Thread(target=END_OF_TESTS.wait, daemon=True).start()


class LeaksObjects(_LeaksBySet):
    """no_leaks"""

    def leak(self) -> None:
        self.__dict__.setdefault("kept", []).append([self.n_sets, [], []])


class LeaksMemory(_LeaksBySet):
    """no_leaks"""

    def leak(self) -> None:
        self.__dict__.setdefault("blocks", []).append(b"\1" * (96 << 10))


class OneSlotForAllThreads(RightBackend):
    """threads_do_not_mix"""

    slot: Buffer | None

    def get(self, key: str) -> Buffer | None:
        self.slot = super().get(key)
        time.sleep(0.0001)
        return self.slot


class OneBounceBufferForAllThreads(RightBackend):
    """threads_do_not_mix"""

    buffer: bytearray

    def open(self) -> None:
        super().open()
        self.buffer = bytearray(4 << 20)

    def get(self, key: str) -> Buffer | None:
        value = super().get(key)
        if value is None:
            return None
        for start in range(0, len(value), 64):
            self.buffer[start : start + 64] = value[start : start + 64]
        return bytes(self.buffer[: len(value)])


class StoresInTwoSteps(RightBackend):
    """all_or_nothing"""

    def set(self, key: str, value: Buffer) -> None:
        if len(value) == _RACED_NBYTES and not self.exists(key):
            super().set(key, bytes(value[:8000]).ljust(len(value), b"\0"))
            time.sleep(0.001)
        super().set(key, value)


class ReplacesInTwoSteps(RightBackend):
    """re_put_stays_readable"""

    def set(self, key: str, value: Buffer) -> None:
        if len(value) == _RACED_NBYTES and self.exists(key):
            self.objects.pop(key, None)
            time.sleep(0.001)
        super().set(key, value)


class StoreForEachInstance(RightBackend):
    """instances_share"""

    @property
    def objects(self) -> dict[str, bytes]:
        assert super().objects is not None
        own: dict[str, bytes] = self.__dict__.setdefault("own", {})
        return own


class CloseEmptiesTheStore(RightBackend):
    """close_leaves_the_others"""

    def close(self) -> None:
        if self.is_open:
            self.objects.clear()
        super().close()


class InOneProcessOnly(RightBackend):
    """two_processes"""


class DirectoryBackend(RightBackend):
    """Right: a directory that processes share, each object moved in whole."""

    name: ClassVar[str] = "directory"

    def file(self, key: str) -> Path:
        """Where the object of ``key`` lies."""
        assert self.objects is not None
        return Path(self.settings.store, key.replace("/", "-"))

    def get(self, key: str) -> Buffer | None:
        try:
            return self.file(key).read_bytes()
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        return self.file(key).exists()

    def set(self, key: str, value: Buffer) -> None:
        target = self.file(key)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as part:
            part.write(value)
        Path(part.name).rename(target)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.file(key).unlink(missing_ok=True)


class WritesInPlace(DirectoryBackend):
    """killed_writer"""

    # Two processes and many threads keep out of each other's way by a lock, which a killed process
    # gives up in the middle of its object.

    def get(self, key: str) -> Buffer | None:
        with self._locked():
            return super().get(key)

    def set(self, key: str, value: Buffer) -> None:
        with self._locked(), self.file(key).open("wb", buffering=0) as file:
            file.write(value[: len(value) // 2])
            if len(value) == _RACED_NBYTES:
                time.sleep(0.002)
            file.write(value[len(value) // 2 :])

    def _locked(self) -> tempfile._TemporaryFileWrapper[bytes]:
        file = self.file("lock").open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file  # type: ignore[return-value]  # closing it gives the lock up


class StopsAtAbsent(RightBackend):
    """delete_removes"""

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            if self.objects.pop(key, None) is None:
                return


class BelievesExists(RightBackend):
    """evicted_after_exists"""

    def exists(self, key: str) -> bool:
        present = super().exists(key)
        if present:
            self.__dict__.setdefault("seen", set()).add(key)
        return present

    def get(self, key: str) -> Buffer | None:
        return self.objects[key] if key in self.__dict__.get("seen", ()) else super().get(key)


class DeletesInTwoSteps(RightBackend):
    """delete_while_reading"""

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            value = self.objects.get(key)
            if value is not None and len(value) == _RACED_NBYTES:
                self.objects[key] = value[:8000].ljust(len(value), b"\0")
                time.sleep(0.001)
        super().delete(keys)


class HidesWhatItHas(RichBackend):
    """says_what_it_can"""

    def capability(self, kind: type[C]) -> C | None:
        return None if kind is Listable else super().capability(kind)


class GivesWhatCannot(RichBackend):
    """says_what_it_can"""

    def capability(self, kind: type[C]) -> C | None:
        return cast(C, object()) if kind is Pins else super().capability(kind)


class RefusesNewKinds(RichBackend):
    """says_what_it_can"""

    def capability(self, kind: type[C]) -> C | None:
        if kind.__module__ != Listable.__module__:
            raise ValueError(f"no such capability: {kind.__name__}")
        return super().capability(kind)


class ChangesItsMind(RichBackend):
    """says_what_it_can"""

    n_asked = 0

    def capability(self, kind: type[C]) -> C | None:
        self.n_asked += kind is Listable
        return super().capability(kind) if kind is not Listable or self.n_asked < 2 else None


class ListsEverything(RichBackend):
    """lists_by_prefix"""

    def list_keys(self, prefix: str) -> Iterator[str]:
        return super().list_keys("")

    def clear(self, prefix: str) -> int:
        keys = list(super().list_keys(prefix))
        self.delete(keys)
        return len(keys)


class ClearCountsNothing(RichBackend):
    """clears_by_prefix"""

    def clear(self, prefix: str) -> int:
        super().clear(prefix)
        return 0


class StatsInWords(RichBackend):
    """counts_in_stats"""

    def stats(self) -> Mapping[str, float]:
        return {"objects": "many"}  # type: ignore[dict-item]  # that is the defect


class FindsNothingToSay(RichBackend):
    """diagnoses"""

    def diagnose(self) -> Iterator[Finding]:
        return iter([])


class KnowsOneBuffer(RichBackend):
    """registered_memory"""

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        self.__dict__["n_buffers"] = len(buffers)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return super().batch_set(keys, pages) if self.__dict__["n_buffers"] == 1 else 0


class LogsItsPassword(RightBackend):
    """secrets_stay_hidden"""

    def set(self, key: str, value: Buffer) -> None:
        super().set(key, value)
        if self.settings.password is not None:
            logging.getLogger("a.backend").debug("%s", self.settings.password.get_secret_value())


class CountsDroppedPages(RightBackend):
    """full_store"""

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        super().batch_set(keys, pages)
        return len(keys)


class RemembersWhatIsDeleted(RightBackend):
    """behaves_like_memory"""

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        n_filled = super().batch_get(keys, pages)
        read = self.__dict__.setdefault("read", {})
        read.update((key, self.objects.get(key)) for key in keys[:n_filled])
        return n_filled

    def get(self, key: str) -> Buffer | None:
        value = super().get(key)
        return self.__dict__.get("read", {}).get(key) if value is None else value


class StoresInOneNamespace(RightBackend):
    """behaves_like_memory"""

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        namespace = keys[0].partition("/")[0] if keys else ""
        return super().batch_set([f"{namespace}/{key.partition('/')[2]}" for key in keys], pages)
