"""Slab files: slots of one size, each with a header, an object and a footer.

    slot n at n × slot_nbytes                                            multiple of 4 KiB
    | header 256 | object nbytes                      | footer 16 | unused ...............|

The header is a function of key, length and generation, so it is checked by building it again. The
footer is written last and repeats the generation. If a write was interrupted, the two differ.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import xxhash

from hicache_core.errors import BackendDenied, BackendError, BackendFull, BackendUnavailable
from hicache_core.plugin.backends import log_once
from hicache_hf3fs.metadata import Found

logger = logging.getLogger(__name__)

HEADER_NBYTES = 256
FOOTER_NBYTES = 16
MAX_KEY_NBYTES = 200
_BLOCK_NBYTES = 4096
_MAGIC, _END_MAGIC, _VERSION = b"Hi3F", b"Hi3F end", 1
_HEADER = struct.Struct("<4sHHQQ200s")  # magic, version, key's length, nbytes, generation, key
_DIGEST = struct.Struct("<Q24x")  # xxh3-64 of what precedes
_FOOTER = struct.Struct("<Q8s")
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY)  # as of some network file systems
_PUNCH_HOLE_KEEP_SIZE = 0x03
_NAME = re.compile(r"r(\d+)\.(\d+)")


def slot_nbytes_for(object_nbytes: int) -> int:
    """Returns the length of a slot for objects of up to ``object_nbytes``."""
    return -(-(HEADER_NBYTES + object_nbytes + FOOTER_NBYTES) // _BLOCK_NBYTES) * _BLOCK_NBYTES


def pack_header(key: str, nbytes: int, generation: int) -> bytes:
    """Returns the 256 bytes before an object.

    Args:
        key: of the object.
        nbytes: length of the object.
        generation: of the slot's reservation.
    """
    name = key.encode()
    packed = _HEADER.pack(_MAGIC, _VERSION, len(name), nbytes, generation, name)
    return packed + _DIGEST.pack(xxhash.xxh3_64_intdigest(packed))


def pack_footer(generation: int) -> bytes:
    """Returns the 16 bytes after an object."""
    return _FOOTER.pack(generation, _END_MAGIC)


def slab_name(rank: int, slot_nbytes: int) -> str:
    """Returns the name of a rank's slab in the metadata store."""
    return f"r{rank}.{slot_nbytes}"


def is_slab_name(name: object) -> bool:
    """Returns whether ``name`` has the form of ``slab_name``."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def slabs_of(prefix: Path) -> list[str]:
    """Returns the names of all slabs of a prefix that have a file."""
    start = f"{prefix.name}."
    found = (path.name.removeprefix(start) for path in prefix.parent.glob(f"{start}r*.slab"))
    return sorted(name for one in found if is_slab_name(name := one.removesuffix(".slab")))


def slab_path(prefix: Path, name: str) -> Path:
    """Returns the path of a slab's file."""
    return prefix.with_name(f"{prefix.name}.{name}.slab")


class Slab:
    """An open slab file. The owner closes it; a ``PageIO`` reads and writes it."""

    def __init__(self, path: Path, name: str, fd: int) -> None:
        """Takes over an open file.

        Args:
            path: of the file.
            name: from ``slab_name``.
            fd: descriptor of the file, which ``close`` closes.
        """
        match = _NAME.fullmatch(name)
        assert match is not None  # names are made by slab_name only
        self.path = path
        self.name = name
        self.fd = fd
        self.slot_nbytes = int(match[2])

    @classmethod
    def existing(cls, prefix: Path, name: str) -> Slab | None:
        """Opens the slab of any rank; None if it has no file."""
        path = slab_path(prefix, name)
        try:
            return cls(path, name, os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise translated(exc, path) from exc

    @classmethod
    def allocated(cls, prefix: Path, name: str, file_nbytes: int) -> Slab:
        """Opens the slab of this rank, with at least ``file_nbytes`` reserved on the disk.

        Args:
            prefix: path that the names of slab files start with.
            name: of the slab.
            file_nbytes: minimum length of its file.

        Raises:
            BackendFull: the file system has too little free space.
            BackendDenied: it is not writable.
            BackendUnavailable: the directory does not exist.
        """
        path = slab_path(prefix, name)
        try:
            fd = _locked(path)
        except OSError as exc:
            raise translated(exc, path) from exc
        before = os.fstat(fd).st_size
        try:
            if before < file_nbytes:
                _allocate(path, fd, file_nbytes)
        except OSError as exc:
            os.ftruncate(fd, before)
            if before == 0:
                path.unlink(missing_ok=True)
            os.close(fd)
            raise translated(exc, path, file_nbytes) from exc
        with contextlib.suppress(OSError):  # some network file systems know no locks
            fcntl.flock(fd, fcntl.LOCK_UN)
        return cls(path, name, fd)

    @property
    def n_slots(self) -> int:
        """Number of whole slots in the file now."""
        return os.fstat(self.fd).st_size // self.slot_nbytes

    @property
    def object_nbytes(self) -> int:
        """Length of the largest object that fits into a slot."""
        return self.slot_nbytes - HEADER_NBYTES - FOOTER_NBYTES

    @property
    def is_removed(self) -> bool:
        """Returns whether its file was deleted: what is written there is lost."""
        return not os.fstat(self.fd).st_nlink

    def give_room(self, nbytes: int) -> bool:
        """Frees the disk space of its last slots and their objects; returns whether it could."""
        n_slots = min(self.n_slots, -(-nbytes // self.slot_nbytes))
        start = (self.n_slots - n_slots) * self.slot_nbytes
        length = n_slots * self.slot_nbytes
        return bool(length) and _fallocate(self.fd, _PUNCH_HOLE_KEEP_SIZE, start, length) == 0

    def close(self) -> None:
        """Closes the file."""
        os.close(self.fd)

    def scan(self) -> Iterator[Found]:
        """Yields every slot with a complete object, in order; skips holes."""
        number, n_slots = 0, self.n_slots
        while number < n_slots:
            try:
                offset = os.lseek(self.fd, number * self.slot_nbytes, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno == errno.ENXIO:  # nothing but a hole to the end
                    return
                offset = number * self.slot_nbytes  # no SEEK_DATA here: look at every slot
            number = max(number, offset // self.slot_nbytes)
            if number < n_slots:
                found = self._object_in(number)
                if found is not None:
                    yield found
            number += 1

    def _object_in(self, number: int) -> Found | None:
        start = number * self.slot_nbytes
        header = os.pread(self.fd, HEADER_NBYTES, start)
        if len(header) < HEADER_NBYTES or header[:4] != _MAGIC:
            return None
        _, version, key_nbytes, nbytes, generation, name = _HEADER.unpack_from(header)
        if version != _VERSION or key_nbytes > MAX_KEY_NBYTES or nbytes > self.object_nbytes:
            return None
        key = name[:key_nbytes].decode("ascii", "replace")
        footer = os.pread(self.fd, FOOTER_NBYTES, start + HEADER_NBYTES + nbytes)
        if header != pack_header(key, nbytes, generation) or footer != pack_footer(generation):
            return None
        return Found(number, generation, key, nbytes)


def _locked(path: Path) -> int:
    """Opens the slab, creates it if it is missing, and locks it for allocation."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as exc:
            if exc.errno not in _NO_LOCKS:
                os.close(fd)
                raise
            return fd
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # another process found the disk full and has removed it again


def _allocate(path: Path, fd: int, nbytes: int) -> None:
    """Reserves the disk space, so that later writes into slots cannot fail on a full disk."""
    if _fallocate(fd, 0, 0, nbytes) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(code, os.strerror(code))
    # glibc's posix_fallocate would now write a byte into every block, of a terabyte perhaps.
    status = os.fstatvfs(fd)
    if status.f_bavail * status.f_frsize < nbytes - os.fstat(fd).st_blocks * 512:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(fd, nbytes)
    log_once(
        logger,
        logging.WARNING,
        f"{path}: this file system cannot reserve space; writes are dropped if others fill it",
    )


def translated(exc: OSError, path: Path, nbytes: int = 0) -> BackendError:
    """Returns the ``BackendError`` for an error of the system.

    Args:
        exc: the error.
        path: of the slab file.
        nbytes: bytes that were needed, for messages about a full disk.
    """
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        status = os.statvfs(path.parent)
        return BackendFull(
            f"slab {path} needs {nbytes} bytes, but its file system has room for "
            f"{status.f_bavail * status.f_frsize}; lower file_size or make room ({exc.strerror})"
        )
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return BackendDenied(f"slab {path} is not writable: {exc.strerror}; check owner and mount")
    if exc.errno == errno.ENOENT:
        return BackendUnavailable(
            f"directory {path.parent} does not exist; mount the file system or create it"
        )
    return BackendUnavailable(f"slab {path} cannot be opened: {exc.strerror}")


_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
