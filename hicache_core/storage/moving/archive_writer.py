"""Writing an archive: as the target of a move."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

from hicache_core.errors import BackendError
from hicache_core.storage.moving.archive import END, END_BLOCKS, HEAD, Head, pack, padding
from hicache_core.storage.moving.base import Intact
from hicache_core.storage.moving.terms import Said

_IOV_MAX = os.sysconf("SC_IOV_MAX")


class ArchiveWriter:
    """Appends objects to an archive as they are. Any worker may call; one at a time writes.

    A move that is interrupted leaves a half archive, whose whole members can be imported, and which
    another move can go on with.
    """

    def __init__(
        self,
        file: BinaryIO,
        kept: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Writes nothing yet.

        Args:
            file: where to, at the place of the next member; nothing of it is buffered here.
            kept: of ``kept_in``: the objects that are there already, with their lengths.
            clock: seconds since the epoch.
        """
        self._fd = file.fileno()
        self._kept = kept or {}
        self._clock = clock
        self._lock = threading.Lock()
        self._n_objects = len(self._kept)
        self._nbytes = sum(self._kept.values())

    def begin(self, head: Head) -> None:
        """Writes the first member of a new archive."""
        self._write(self._member(HEAD, head.encode()))

    def said(self, _namespace: str) -> Said:
        # docstring inherited from Target; what is there was exported under the same names
        return Said()

    def has(self, keys: Sequence[str]) -> Sequence[bool]:
        # docstring inherited from Target
        return [key in self._kept for key in keys]

    def write(self, objects: Sequence[Intact]) -> Sequence[bool]:
        # docstring inherited from Target; a full disk is an OSError
        buffers = [part for one in objects for part in self._member(one.key, one.page[0])]
        with self._lock:
            self._write(buffers)
            self._n_objects += len(objects)
            self._nbytes += sum(one.page[0].nbytes for one in objects)
        return [True] * len(objects)

    def finish(self) -> None:
        """Writes the end, which says that the archive is whole."""
        text = json.dumps({"objects": self._n_objects, "nbytes": self._nbytes}).encode() + b"\n"
        self._write([*self._member(END, text), END_BLOCKS])

    def _member(self, name: str, content: bytes | memoryview) -> list[bytes | memoryview]:
        nbytes = len(content)
        return [pack(name, nbytes, self._clock()), content, bytes(padding(nbytes))]

    def _write(self, buffers: list[bytes | memoryview]) -> None:
        left = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while left:
            try:
                n = os.writev(self._fd, left[:_IOV_MAX])
            except BrokenPipeError:
                raise
            except OSError as error:
                raise BackendError(
                    f"the archive cannot be written: {error.strerror}; what it has so far can be "
                    "imported, and --resume goes on with it"
                ) from error
            at = 0
            while at < len(left) and n >= left[at].nbytes:
                n -= left[at].nbytes
                at += 1
            left = left[at:]
            if n:
                left[0] = left[0][n:]
