"""Records in segment files: the bytes of the file backend, without an index.

A segment file starts with a block of 4 KiB that identifies it. Extents follow, each a multiple of
4 KiB long. A written extent holds one record:

    0        256              256 + nbytes   + 16          capacity
    | header | the object ... | footer       | padding ... |

Header and footer contain the same generation, a number that is unique to this write. Both are
written by one call, front to back. If the writer dies in the middle the generations differ, and the
record is invalid. The header repeats the key and has a checksum of its own, so that a lost index
can be rebuilt from the headers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import xxhash

from hicache_core.types import Page

BLOCK_NBYTES = 4096
SEGMENT_NBYTES = 256 << 20
MAX_KEY_NBYTES = 200
INDEX_RESERVE_NBYTES = 16 << 20

_SEGMENT_MAGIC = b"HiCache segment, version 1\n"
_SEGMENT_NAME = re.compile(r"([0-9a-f]{8})\.seg")
_HEADER = struct.Struct("<4sHHQQQd200sQ")  # magic, version, key's length, nbytes, capacity,
_FOOTER = struct.Struct("<Q8s")  #           generation, written_at, key, xxh3-64 of what precedes
_HEADER_NBYTES = 256
OVERHEAD_NBYTES = _HEADER_NBYTES + _FOOTER.size
_PADDING = bytes(_HEADER_NBYTES - _HEADER.size)
_MAGIC, _END_MAGIC, _VERSION = b"HiCR", b"HiCR end", 1
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 0x03


_VectoredCall: TypeAlias = Callable[[int, list[memoryview | bytes], int], int]


class Extent(NamedTuple):
    """A range of a segment file with space for one record.

    Attributes:
        extent_id: row of the index.
        segment: number of the file.
        offset: its start in bytes, a multiple of 4 KiB.
        capacity: its length in bytes, a multiple of 4 KiB.
        generation: number in its header and footer.
    """

    extent_id: int
    segment: int
    offset: int
    capacity: int
    generation: int


class Record(NamedTuple):
    """A complete record that a scan found, and its place."""

    key: str
    nbytes: int
    written_at: float
    extent: Extent


def capacity_for(nbytes: int) -> int:
    """Returns the length in bytes of the extent for an object of ``nbytes``."""
    return -(-(nbytes + OVERHEAD_NBYTES) // BLOCK_NBYTES) * BLOCK_NBYTES


def _pack_header(key: str, nbytes: int, extent: Extent, written_at: float) -> bytes:
    name = key.encode()
    fields = (nbytes, extent.capacity, extent.generation, written_at, name)
    packed = _HEADER.pack(_MAGIC, _VERSION, len(name), *fields, 0)[:-8]
    return packed + struct.pack("<Q", xxhash.xxh3_64_intdigest(packed)) + _PADDING


def _vectored(call: _VectoredCall, fd: int, buffers: list[memoryview | bytes], offset: int) -> int:
    """Calls ``os.preadv`` or ``os.pwritev`` for all ``buffers``; returns the bytes moved."""
    done = 0
    while buffers:
        n = call(fd, buffers[:_IOV_MAX], offset + done)
        done += n
        if n == 0:
            return done
        while buffers and n >= len(buffers[0]):
            n -= len(buffers[0])
            buffers = buffers[1:]
        if n:
            buffers = [memoryview(buffers[0])[n:], *buffers[1:]]
    return done


class _SegmentFile:
    """A descriptor that is closed when the last reference to this object goes.

    A thread that reads holds a reference, so its descriptor is not closed and reused meanwhile.
    """

    def __init__(self, path: Path, flags: int = os.O_RDWR) -> None:
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class RecordStore:
    """Reads and writes records at given extents. ``FileSpace`` decides who may use which extent.

    Threads: every method may be called from any thread. Errors of the system are ``OSError``.
    """

    def __init__(self, directory: Path, *, durable: bool = False, read_only: bool = False) -> None:
        """Opens nothing yet.

        Args:
            directory: of the segment files.
            durable: new files reach the disk before they are used.
            read_only: nothing is written, and no right to do so is needed.
        """
        self._directory = directory
        self._durable = durable
        self._flags = os.O_RDONLY if read_only else os.O_RDWR
        self._files: dict[int, _SegmentFile] = {}

    def write(self, key: str, page: Page, extent: Extent, written_at: float) -> None:
        """Writes one record; only the caller may use the extent.

        Args:
            key: of the object.
            page: its segments.
            extent: where to write; long enough for the record.
            written_at: seconds since the epoch.
        """
        nbytes = extent_nbytes = sum(map(len, page))
        header = _pack_header(key, nbytes, extent, written_at)
        footer = _FOOTER.pack(extent.generation, _END_MAGIC)
        extent_nbytes += OVERHEAD_NBYTES
        file = self._file(extent.segment)
        buffers: list[memoryview | bytes] = [header, *page, footer]
        if len(buffers) <= _IOV_MAX:  # nearly always one call
            done = os.pwritev(file.fd, buffers, extent.offset)
            if done == extent_nbytes:
                return
        done = _vectored(os.pwritev, file.fd, [b for b in buffers if len(b)], extent.offset)
        if done != extent_nbytes:
            raise OSError(errno.ENOSPC, f"{done} of {extent_nbytes} bytes written")

    def read(self, key: str, page: Page, extent: Extent) -> bool:
        """Reads the object of ``key`` into ``page``.

        Args:
            key: of the object.
            page: where to, as long as the object.
            extent: of its record.

        Returns:
            False if the extent does not contain the complete record.
        """
        header, footer = bytearray(_HEADER_NBYTES), bytearray(_FOOTER.size)
        buffers = [memoryview(header), *page, memoryview(footer)]
        nbytes = sum(map(len, page))
        try:
            file = self._file(extent.segment)
        except FileNotFoundError:  # another process has just removed the segment
            return False
        if len(buffers) <= _IOV_MAX:
            done = os.preadv(file.fd, buffers, extent.offset)
        if len(buffers) > _IOV_MAX or done != nbytes + OVERHEAD_NBYTES:
            whole = [buffer for buffer in buffers if len(buffer)]
            done = _vectored(os.preadv, file.fd, list(whole), extent.offset)
        if done != nbytes + OVERHEAD_NBYTES:
            return False
        magic, version, key_nbytes, its_nbytes, _, generation, _, name, _ = _HEADER.unpack_from(
            header
        )
        return bool(
            (magic, version) == (_MAGIC, _VERSION)
            and its_nbytes == nbytes
            and generation == extent.generation
            and name[:key_nbytes] == key.encode()
            and footer == _FOOTER.pack(extent.generation, _END_MAGIC)
        )

    def create(self, segment: int) -> None:
        """Creates the file of a segment, with its first block.

        Raises:
            FileExistsError: a file with that name exists, perhaps a foreign one; it is left alone.
        """
        file = _SegmentFile(self._path(segment), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.pwrite(file.fd, _SEGMENT_MAGIC.ljust(BLOCK_NBYTES, b"\0"), 0)
        self._files[segment] = file
        if self._durable:
            fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def removed(self, segments: set[int]) -> set[int]:
        """Returns those of ``segments`` whose file was deleted: what was written there is lost."""
        return {n for n in segments if not os.fstat(self._file(n).fd).st_nlink}

    def sync(self, segments: set[int]) -> None:
        """Blocks until everything written to ``segments`` is on the medium."""
        for segment in segments:
            os.fdatasync(self._file(segment).fd)

    def punch(self, segment: int, offset: int, nbytes: int) -> bool:
        """Frees the disk space of a range; returns False if the file system cannot do that.

        Args:
            segment: number of the file.
            offset: first byte of the range.
            nbytes: length of the range.
        """
        fd = self._file(segment).fd
        return bool(_fallocate(fd, _FALLOC_FL_PUNCH_HOLE_KEEP_SIZE, offset, nbytes) == 0)

    def free_nbytes(self) -> int:
        """Returns the free bytes of the disk, less a reserve for the index."""
        status = os.statvfs(self._directory)
        reserved = min(INDEX_RESERVE_NBYTES, status.f_blocks * status.f_frsize // 10)
        return max(0, status.f_bavail * status.f_frsize - reserved)

    def can_punch(self) -> bool:
        """Returns whether the file system can free parts of a file."""
        with tempfile.TemporaryFile(dir=self._directory) as file:
            file.write(bytes(2 * BLOCK_NBYTES))
            file.flush()
            flags = _FALLOC_FL_PUNCH_HOLE_KEEP_SIZE
            return bool(_fallocate(file.fileno(), flags, BLOCK_NBYTES, BLOCK_NBYTES) == 0)

    def unlink(self, segment: int) -> None:
        """Deletes the file of a segment; reads in progress can finish."""
        self._files.pop(segment, None)
        self._path(segment).unlink(missing_ok=True)

    def forget_files(self, kept: frozenset[int]) -> None:
        """Closes the files of segments not in ``kept``, which another process removed."""
        for segment in self._files.keys() - kept:
            self._files.pop(segment, None)

    def close(self) -> None:
        """Closes all files; those in use are closed after their use."""
        self._files.clear()

    def segments(self) -> list[int]:
        """Returns the sorted numbers of the segment files; ignores other files."""
        found = []
        for name in os.listdir(self._directory):
            match = _SEGMENT_NAME.fullmatch(name)
            if match is not None and self._is_segment(self._directory / name):
                found.append(int(match[1], 16))
        return sorted(found)

    def end_of(self, segment: int) -> int:
        """Returns the length of a segment's file in bytes, rounded up to whole blocks."""
        nbytes = os.fstat(self._file(segment).fd).st_size
        return max(1, -(-nbytes // BLOCK_NBYTES)) * BLOCK_NBYTES

    def scan(self, segment: int) -> Iterator[Record]:
        """Yields every complete record of a segment, in order; skips holes and torn records."""
        fd, offset, end = self._file(segment).fd, BLOCK_NBYTES, self.end_of(segment)
        while offset < end:
            try:
                offset = os.lseek(fd, offset, os.SEEK_DATA) // BLOCK_NBYTES * BLOCK_NBYTES
            except OSError as exc:
                if exc.errno == errno.ENXIO:  # only a hole up to the end
                    return
                raise
            record = self._record_at(segment, offset)
            if record is None:
                offset += BLOCK_NBYTES
            else:
                offset += record.extent.capacity
                yield record

    def _record_at(self, segment: int, offset: int) -> Record | None:
        fd = self._file(segment).fd
        header = os.pread(fd, _HEADER.size, offset)
        if len(header) < _HEADER.size or header[:4] != _MAGIC:
            return None
        _, version, key_nbytes, nbytes, capacity, generation, written_at, name, digest = (
            _HEADER.unpack(header)
        )
        if version != _VERSION or xxhash.xxh3_64_intdigest(header[:-8]) != digest:
            return None
        footer = os.pread(fd, _FOOTER.size, offset + _HEADER_NBYTES + nbytes)
        if footer != _FOOTER.pack(generation, _END_MAGIC):
            return None
        extent = Extent(0, segment, offset, capacity, generation)
        return Record(name[:key_nbytes].decode(), nbytes, written_at, extent)

    def _path(self, segment: int) -> Path:
        return self._directory / f"{segment:08x}.seg"

    def _file(self, segment: int) -> _SegmentFile:
        file = self._files.get(segment)
        if file is None:  # two threads may both open it; one of the two files is closed again
            file = _SegmentFile(self._path(segment), self._flags)
            file = self._files.setdefault(segment, file)
        return file

    @staticmethod
    def _is_segment(path: Path) -> bool:
        """Returns whether ``path`` is a segment; a process killed in ``create`` leaves it empty."""
        with path.open("rb") as file:
            return file.read(len(_SEGMENT_MAGIC)) in (_SEGMENT_MAGIC, b"")


_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
