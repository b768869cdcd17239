"""An emulation of ``hf3fs_fuse.io`` 1.2.9 on ordinary files and threads. It is not 3FS.

It keeps to the published interface and is stricter than 3FS where a mistake would go unseen there:
files must be registered, and still be the file that was; slices must lie in a known iovec and not
be used twice at once; a ring does not take more than its entries, nor the other direction. What
breaks a rule is kept in ``violations``. Operations are carried out and completed in random order,
by a mapping of the shared memory of its own, as 3FS's daemon has one. ``faults`` makes it fail.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

violations: list[str] = []
registered: dict[int, tuple[int, int]] = {}
_order = random.Random(4711)


@dataclass
class Faults:
    """What goes wrong from now on."""

    errors: list[int] = field(default_factory=list)  # errno of the next operations
    short_by: int = 0  # bytes that every read gives less than asked
    hang: bool = False  # operations are put aside
    aside: list[_Operation] = field(default_factory=list)

    def carry_out_late(self) -> None:
        """Does what was put aside, without telling anybody."""
        while self.aside:
            self.aside.pop().carry_out()


faults = Faults()


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _broken(rule: str) -> RuntimeError:
    violations.append(rule)
    return RuntimeError(rule)


def extract_mount_point(path: str) -> str | None:
    """The emulated mount, if ``path`` lies in it."""
    mount = os.environ.get("HF3FS_EMULATION_MOUNT")
    if mount and Path(path).resolve().is_relative_to(Path(mount).resolve()):
        return mount
    return None


def register_fd(fd: int, flags: int = 0) -> None:
    """As 3FS's; a number that is registered already is refused."""
    if fd in registered:
        raise _broken(f"descriptor {fd} is registered twice")
    registered[fd] = _identity(fd)


def deregister_fd(fd: int) -> None:
    """As 3FS's; the descriptor must still be open."""
    if registered.pop(fd, None) != _identity(fd):
        raise _broken(f"descriptor {fd} was not registered, or was closed before")


class iovec:  # noqa: N801 - the name of the interface
    """Shared memory that the emulated daemon maps through a link in the mount."""

    def __init__(self, shm: SharedMemory, mount: str) -> None:
        directory = Path(mount, "3fs-virt", "iovs")
        directory.mkdir(parents=True, exist_ok=True)
        self.link = directory / str(uuid.uuid4())
        self.link.symlink_to(f"/dev/shm/{shm.name}")
        with self.link.open("r+b") as file:
            self.memory = memoryview(mmap.mmap(file.fileno(), 0))
        self.in_use: set[tuple[int, int]] = set()

    def __getitem__(self, part: slice) -> _Slice:
        start, stop, step = part.indices(self.memory.nbytes)
        if step != 1 or start >= stop or (part.stop or stop) > self.memory.nbytes:
            raise _broken(f"{part} is no part of an iovec of {self.memory.nbytes} bytes")
        return _Slice(self, start, stop)

    def __del__(self) -> None:
        self.link.unlink()


@dataclass(frozen=True)
class _Slice:
    iovec: iovec
    start: int
    stop: int


@dataclass
class _Operation:
    part: _Slice
    read: bool
    fd: int
    offset: int
    userdata: object
    result: int = 0

    def carry_out(self) -> None:
        """Moves the bytes as the daemon does: to or from its own mapping."""
        memory = self.part.iovec.memory[self.part.start : self.part.stop]
        if self.read and faults.short_by:
            memory = memory[: max(0, memory.nbytes - faults.short_by)]
        call = os.preadv if self.read else os.pwritev
        try:
            self.result = call(self.fd, [memory], self.offset)
        except OSError as exc:
            self.result = -(exc.errno or errno.EIO)


class ioring:  # noqa: N801 - the name of the interface
    """Prepared operations, those under way, and those that ended."""

    def __init__(self, mount: str, entries: int, for_read: bool) -> None:
        if extract_mount_point(mount) is None:
            raise OSError(errno.ENOENT, f"{mount} is no 3FS mount")
        self._entries = entries
        self._for_read = for_read
        self._prepared: list[_Operation] = []
        self._n_under_way = 0
        self._ended: list[_Operation] = []
        self._change = threading.Condition()

    def prepare(
        self, part: _Slice, read: bool, fd: int, offset: int, userdata: object = None
    ) -> None:
        """Checks everything that 3FS would find out by doing harm."""
        if read is not self._for_read:
            raise _broken("a ring for one direction was given the other")
        if fd not in registered or registered[fd] != _identity(fd):
            raise _broken(f"descriptor {fd} is not registered, or is another file now")
        with self._change:
            n = len(self._prepared) + self._n_under_way + len(self._ended)
            if n >= self._entries:
                raise _broken(f"{n} operations fill a ring of {self._entries} entries")
            for start, stop in part.iovec.in_use:
                if start < part.stop and part.start < stop:
                    raise _broken("a slice is used by two operations at once")
            part.iovec.in_use.add((part.start, part.stop))
            self._prepared.append(_Operation(part, read, fd, offset, userdata))

    def submit(self) -> ioring:
        """Hands everything over, in an order of its own."""
        with self._change:
            batch, self._prepared = self._prepared, []
            self._n_under_way += len(batch)
        _order.shuffle(batch)
        if batch:
            threading.Thread(target=self._work, args=(batch,)).start()
        return self

    def _work(self, batch: list[_Operation]) -> None:
        for operation in batch:
            if faults.hang:
                faults.aside.append(operation)
                continue
            if faults.errors:
                operation.result = -faults.errors.pop(0)
            else:
                operation.carry_out()
            with self._change:
                self._n_under_way -= 1
                self._ended.insert(_order.randint(0, len(self._ended)), operation)
                self._change.notify_all()

    def wait(
        self,
        *,
        max_results: int = 0,
        min_results: int = 0,
        timeout: timedelta | None = None,
    ) -> list[_Operation]:
        """Some of what ended, at least ``min_results`` unless the time is over."""
        limit = None if timeout is None else timeout.total_seconds()
        with self._change:
            self._change.wait_for(lambda: len(self._ended) >= min_results, limit)
            n = len(self._ended) if not max_results else min(max_results, len(self._ended))
            done, self._ended = self._ended[:n], self._ended[n:]
            for operation in done:
                part = operation.part
                part.iovec.in_use.discard((part.start, part.stop))
        return done


def make_iovec(shm: SharedMemory, mount: str, block_size: int = 0, numa: int = -1) -> iovec:
    """As 3FS's; block size and NUMA node mean nothing here."""
    if extract_mount_point(mount) is None:
        raise FileNotFoundError(f"{mount}/3fs-virt/iovs")
    return iovec(shm, mount)


def make_ioring(mount: str, entries: int, for_read: bool = True, io_depth: int = 0) -> ioring:
    """As 3FS's, with the arguments that are used."""
    return ioring(mount, entries, for_read)


@contextmanager
def no_rule_broken() -> Iterator[Faults]:
    """A clean start; at the end no rule was broken and no file is still registered."""
    violations.clear()
    registered.clear()
    faults.__dict__.update(Faults().__dict__)
    yield faults
    assert not violations, violations
    assert not registered, f"descriptors {sorted(registered)} were never deregistered"
