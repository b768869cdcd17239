"""Reading an archive: as the source of a move, and to go on with a half one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import BinaryIO

from hicache_core.errors import ConfigError
from hicache_core.storage.base import namespace_of
from hicache_core.storage.manifest import Manifest, manifest_key
from hicache_core.storage.moving.archive import (
    BLOCK_NBYTES,
    END,
    HEAD,
    MAX_TEXT_NBYTES,
    Head,
    Member,
    padding,
    unpack,
)
from hicache_core.storage.moving.base import Batch, Intact, Target, wrong
from hicache_core.storage.moving.outcomes import Outcome, Result, Totals
from hicache_core.storage.moving.slab import Slab
from hicache_core.storage.moving.terms import Refuses, Said, Terms, agreed, said_by
from hicache_core.storage.scrub import GOOD, UNKNOWN, classify
from hicache_core.storage.sealed import is_page_key

_NO_NAME = "its header in the archive is damaged"


class Members:
    """The members of an archive, front to back. One thread at a time.

    Attributes:
        offset: bytes up to the end of the last whole member.
        n_damaged: members whose header is damaged; they were skipped.
        is_cut: whether the file ends in the middle of a member.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Begins at the present position of ``file``, which need not be seekable."""
        self.offset = 0
        self.n_damaged = 0
        self.is_cut = False
        self._file = file
        self._read_nbytes = 0

    def next(self) -> Member | None:
        """The next member, folders left out; its content is to be read then. None at the end."""
        block = memoryview(bytearray(BLOCK_NBYTES))
        in_damage = False
        while True:
            n = self._fill(block)
            if n < BLOCK_NBYTES:
                self.is_cut = n > 0 and not in_damage
                return None
            if member := unpack(block):
                if member.name.endswith("/"):
                    continue
                return member
            if not in_damage and not any(block):
                return None
            self.n_damaged += not in_damage
            in_damage = True

    def content(self, member: Member, room: memoryview) -> bool:
        """Reads the content of the member that ``next`` returned.

        Args:
            member: that one.
            room: where to; as long as the content.

        Returns:
            False if the file ends before.
        """
        n_padding = padding(member.nbytes)
        whole = self._fill(room) == member.nbytes
        if not whole or self._fill(memoryview(bytearray(n_padding))) < n_padding:
            self.is_cut = True
            return False
        self.offset = self._read_nbytes
        return True

    def _fill(self, room: memoryview) -> int:
        done = 0
        while done < room.nbytes:
            n = self._file.readinto(room[done:])  # type: ignore[attr-defined]  # all binary files
            if not n:
                break
            done += n
        self._read_nbytes += done
        return done


def read_head(members: Members) -> Head:
    """Reads the first member.

    Raises:
        ConfigError: it is not that of an archive.
    """
    first = members.next()
    if first is None or first.name != HEAD or first.nbytes > MAX_TEXT_NBYTES:
        raise ConfigError(f"this is not an archive of HiCache: it does not begin with {HEAD}")
    text = bytearray(first.nbytes)
    if not members.content(first, memoryview(text)):
        raise ConfigError("the archive ends within its first member; export again")
    return Head.decode(bytes(text))


class ArchiveReader:
    """Reads the objects of an archive, and checks each seal.

    Attributes:
        head: its first member.
    """

    def __init__(self, file: BinaryIO, refuses: Refuses) -> None:
        """Reads the head.

        Args:
            file: the archive, from its beginning; need not be seekable.
            refuses: says what must not be moved.

        Raises:
            ConfigError: it is not an archive of HiCache.
        """
        self._members = Members(file)
        self.head = read_head(self._members)
        self._refuses = refuses
        self._lock = threading.Lock()
        self._terms: dict[str, Terms] = {}
        self._held: Member | None = None
        self._ended = False
        self._has_end = False
        self._n_read = 0

    def take(self, slab: Slab, target: Target) -> Batch | None:
        # docstring inherited from Source
        batch = Batch([], [])
        with self._lock:
            if self._ended:
                return None
            n_damaged = self._members.n_damaged
            objects = self._read(slab)
            for _ in range(self._members.n_damaged - n_damaged):
                batch.others.append(Result("?/?", Outcome.DAMAGED, 0, _NO_NAME))
            asked = []
            for one in objects:
                if not is_page_key(one.key):
                    batch.others.append(wrong(one.key, UNKNOWN, one.page[0].nbytes))
                    continue
                terms = self._terms_of(one, target)
                if terms.refused:
                    batch.others.append(one.ended(Outcome.REFUSED, terms.refused))
                else:
                    asked.append((one, terms))
        there = target.has([one.key for one, _ in asked]) if asked else ()
        for (one, terms), is_there in zip(asked, there, strict=True):
            kind = GOOD if is_there else classify(one.key, one.page[0])
            if is_there:
                batch.others.append(Result(one.key, Outcome.PRESENT))
            else:
                found = one if kind == GOOD else wrong(one.key, kind, one.page[0].nbytes)
                batch.take(found, terms)
        return batch

    def finish(self, totals: Totals) -> None:
        """Tells ``totals`` what the archive lacks; to be called after the move."""
        if self._has_end or totals.stopped:
            return
        planned = sum(own.objects for own in self.head.namespaces.values())
        n_lacking = max(0, planned - self._n_read - self._members.n_damaged)
        totals.n_cut = int(self._members.is_cut and n_lacking > 0)  # else it is the end that is cut
        totals.n_missing = n_lacking - totals.n_cut
        totals.stopped = "the archive is not whole: its export was interrupted, or it was cut"

    def _read(self, slab: Slab) -> list[Intact]:
        """Objects for which the slab has room, or one that is longer."""
        objects: list[Intact] = []
        room = slab.memory
        while member := self._held or self._members.next():
            if member.nbytes > room.nbytes and objects:
                self._held = member
                return objects
            self._held = None
            fits = member.nbytes <= room.nbytes
            page = room[: member.nbytes] if fits else memoryview(bytearray(member.nbytes))
            if not self._members.content(member, page):
                break
            if member.name == END:
                self._has_end = True
                break
            objects.append(Intact(member.name, (page,)))
            self._n_read += 1
            room = room[page.nbytes if fits else 0 :]
        self._ended = True
        return objects

    def _terms_of(self, one: Intact, target: Target) -> Terms:
        """The terms of its namespace, which begins with its manifest, if it has one."""
        namespace = namespace_of(one.key)
        if namespace not in self._terms:
            said = Said()
            if one.key == manifest_key(namespace):
                said = said_by(namespace, one.page[0])
            self._terms[namespace] = self._agreed(namespace, said, target)
        return self._terms[namespace]

    def _agreed(self, namespace: str, said: Said, target: Target) -> Terms:
        if why := self._refuses(namespace, said.manifest):
            return Terms(refused=why)
        return agreed(said, target.said(namespace))


def refuses_nothing(_namespace: str, _manifest: Manifest | None) -> str:
    """Refuses nothing by itself."""
    return ""


def kept_in(file: BinaryIO, namespaces: Sequence[str]) -> tuple[Head, dict[str, int], int]:
    """What of a half archive can be kept: reads all of it, and checks each seal.

    Takes some hundred bytes of memory for each object.

    Args:
        file: the archive, from its beginning.
        namespaces: of the objects that are to be added.

    Returns:
        Its head, the length of each intact object by its key, and the place in the file where the
        next member goes.

    Raises:
        ConfigError: it is not an archive of these namespaces.
    """
    members = Members(file)
    head = read_head(members)
    if others := sorted(set(namespaces) - set(head.namespaces)):
        raise ConfigError(
            f"the archive was begun for {', '.join(head.namespaces)} and cannot take "
            f"{', '.join(others)}; export into another file"
        )
    kept: dict[str, int] = {}
    end = members.offset
    while member := members.next():
        page = memoryview(bytearray(member.nbytes))
        if not members.content(member, page) or member.name == END:
            break
        end = members.offset
        if classify(member.name, page) == GOOD:
            kept[member.name] = member.nbytes
    return head, kept, end
