"""Forks writers, kills them at random moments and examines the store: ``python -m`` this module.

A light process of its own: it forks, so it must have no threads, and it imports no torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import select
import signal
import sqlite3
import time
import traceback
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from hicache_core.storage.file.records import BLOCK_NBYTES
from hicache_core.storage.sealed import SealedBackend
from tests.crash.reports import Reports, held_nbytes, payload_nbytes
from tests.crash.writer import HEADER_NBYTES, Plan, opened, read, write

WITNESS_PAUSE_S = 0.02


class Writer:
    """A writer process, and the pipe over which it speaks."""

    def __init__(self, path: Path, max_nbytes: int, plan: Plan) -> None:
        self.run = plan.run
        self.pipe, speak = os.pipe()
        listen, self._stop = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._stop)
            status = 1
            try:
                write(path, max_nbytes, speak, listen, plan)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(speak)
        os.close(listen)
        self._text = b""

    def hear(self, reports: Reports, seconds: float = 0.0) -> None:
        """Takes over what it has said, and says within ``seconds``."""
        end = time.monotonic() + seconds
        while select.select([self.pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            if not self._take(reports):
                return

    def kill(self, reports: Reports) -> None:
        """Ends it in the middle of whatever it does, and takes over its last words."""
        os.kill(self.pid, signal.SIGKILL)
        self._end(reports)
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSIGNALED(status), f"the writer ended by itself: {status}"
        reports.buried(self.run, time.time())

    def stop(self, reports: Reports) -> None:
        """Lets it close its store and end."""
        os.write(self._stop, b"x")
        self._end(reports)
        _, status = os.waitpid(self.pid, 0)
        assert status == 0, f"a writer that was told to stop ended with status {status}"

    def _end(self, reports: Reports) -> None:
        while self._take(reports):
            pass
        os.close(self.pipe)
        os.close(self._stop)

    def _take(self, reports: Reports) -> bool:
        """Takes over what is in the pipe; False at its end."""
        data = os.read(self.pipe, 1 << 16)
        *lines, self._text = (self._text + data).split(b"\n")
        for text in lines:
            reports.take(text.decode())
        return bool(data)


class Examination:
    """Opens the store beside whoever uses it, and holds it against the reports.

    Attributes:
        may_return: keys that were deleted before the index was lost; a rebuilt one may have them.
        n_hits: objects that were read.
    """

    def __init__(self, path: Path, max_nbytes: int, reports: Reports) -> None:
        self._path = path
        self._max_nbytes = max_nbytes
        self._reports = reports
        self._examined: set[str] = set()
        self.may_return: set[str] = set()
        self.n_hits = 0

    def lose_index(self) -> None:
        """Removes the index; whoever opens the store next builds it anew."""
        (self._path / "index.sqlite").unlink()
        self.may_return = self._reports.gone()

    def run(self, *, everything: bool, other: Writer | None = None) -> None:
        """Examines the store.

        Args:
            everything: read all that is stored, not only what was never read before.
            other: a writer that works meanwhile.
        """
        gone, owed = self._reports.gone() - self.may_return, self._owed()
        with closing(opened(self._path, self._max_nbytes)) as backend:
            backend.inner.check_integrity()
            stored = set(backend.inner.list_keys(""))
            if other is not None:  # what it said before the list was made has to be known
                other.hear(self._reports)
            self._check_keys(stored, gone, owed & self._owed())
            if other is None:
                assert len(list((self._path / "owners").iterdir())) == 1
                self._check_figures(stored, backend)
            for key in sorted(stored if everything else stored - self._examined):
                hit = read(backend, [key])
                assert hit or other is not None, f"listed, but cannot be read: {key}"
                self.n_hits += hit
            self._examined |= stored
            stats = backend.stats()
        for what in ("corrupt", "foreign", "wrong_length", "wrong_version"):
            assert stats[f"sealed_{what}"] == 0, stats
        assert stats["damaged_records"] == 0, stats
        if other is None:
            self._check_directory()

    def _owed(self) -> set[str]:
        owed = self._reports.owed(self._max_nbytes)
        return {key for batch in owed for key in batch.page_keys()}

    def _check_keys(self, stored: set[str], gone: set[str], owed: set[str]) -> None:
        missing = sorted(owed - stored)
        assert not missing, f"acknowledged, but lost: {missing[:5]} of {len(missing)}"
        unknown = sorted(stored - self._reports.keys.keys())
        assert not unknown, f"nobody stored {unknown[:5]}"
        back = sorted(stored & gone)
        assert not back, f"deleted, but there: {back[:5]}"

    def _check_figures(self, stored: set[str], backend: SealedBackend) -> None:
        stats = backend.stats()
        used = sum(HEADER_NBYTES + payload_nbytes(key) for key in stored)
        assert stats["objects"] == len(stored)
        assert stats["used_nbytes"] == used, (stats, used)
        assert sum(map(held_nbytes, stored)) <= stats["held_nbytes"] <= self._max_nbytes, stats
        with closing(sqlite3.connect(self._path / "index.sqlite")) as index:
            known = {f"{n:08x}.seg" for (n,) in index.execute("SELECT segment FROM segments")}
            extents = index.execute(
                "SELECT segment, offset, capacity FROM extents ORDER BY segment, offset"
            ).fetchall()
        found = {file.name for file in (self._path / "segments").iterdir()}
        assert found == known, (sorted(found), sorted(known))
        holes = all(finding.topic != "file system" for finding in backend.inner.diagnose())
        for segment, those in itertools.groupby(extents, lambda extent: extent[0]):
            path = self._path / "segments" / f"{segment:08x}.seg"
            leftover = _data_outside(path, [(offset, nbytes) for _, offset, nbytes in those])
            assert leftover is None or not holes, f"{path} has bytes of nobody at {leftover}"

    def _check_directory(self) -> None:
        """Nothing is left but the store itself: no temp file, no journal, nobody's lock."""
        assert list((self._path / "owners").iterdir()) == []
        found = {entry.name for entry in self._path.iterdir()}
        assert found == {"index.sqlite", "open.lock", "owners", "reserve", "segments"}, found


def _data_outside(path: Path, extents: Sequence[tuple[int, int]]) -> int | None:
    """Where the file has bytes that no extent speaks of; None if all such space was given back."""
    fd = os.open(path, os.O_RDONLY)
    try:
        at = BLOCK_NBYTES
        for offset, nbytes in extents:
            with suppress(OSError):  # nothing but a hole to the end
                if at < offset and (data := os.lseek(fd, at, os.SEEK_DATA)) < offset:
                    return data
            at = offset + nbytes
    finally:
        os.close(fd)
    return None


def moment(rng: random.Random) -> float:
    """Seconds until a writer is killed: often while it opens the store, mostly in full flight."""
    return rng.uniform(0.0, 0.015) if rng.random() < 0.2 else rng.uniform(0.01, 0.09)


def run(path: Path, max_nbytes: int, n_kills: int, seed: int, *, witness: bool) -> dict[str, int]:
    """Kills a writer ``n_kills`` times; with ``witness`` a second one works on all the time."""
    rng, reports = random.Random(seed), Reports()
    examination = Examination(path, max_nbytes, reports)
    other = Writer(path, max_nbytes, Plan(n_kills, seed, WITNESS_PAUSE_S)) if witness else None
    for n in range(n_kills):
        if other is None and n % 10 == 9:  # the next writer may be killed while it rebuilds
            examination.lose_index()
        writer = Writer(path, max_nbytes, Plan(n, seed))
        writer.hear(reports, moment(rng))
        writer.kill(reports)
        examination.run(everything=False, other=other)
    if other is not None:
        other.stop(reports)
    examination.run(everything=True)
    examination.lose_index()
    examination.run(everything=True)
    with closing(opened(path, max_nbytes)) as backend:
        n_objects = int(backend.stats()["objects"])
    return {
        "kills": n_kills,
        "acknowledged": sum(b.n for b, e in reports.entries.items() if e.acknowledged),
        "interrupted": sum(not e.acknowledged for e in reports.entries.values()),
        "deleted": len(reports.gone()),
        "owed": sum(batch.n for batch in reports.owed(max_nbytes)),
        "objects": n_objects,
        "read": examination.n_hits,
    }


def main() -> None:
    """Runs it and prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--max-nbytes", type=int, default=4 << 30)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--witness", action="store_true", help="a second writer works on")
    given = parser.parse_args()
    figures = run(given.path, given.max_nbytes, given.kills, given.seed, witness=given.witness)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
