"""The format of an archive: a tar file whose members are sealed objects, named by their keys.

    hicache-archive.json        what the archive is for, and what it was planned to have
    <namespace>/<page hash>     an object as it is stored, header included; a namespace begins with
    ...                         its manifest, if it has one
    hicache-archive-end.json    only in a whole archive: what it has

Members are in the ustar format, so any tar lists and unpacks them. Each object verifies itself by
its seal. An archive is written and read front to back, also through a pipe.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from hicache_core.errors import ConfigError

HEAD, END = "hicache-archive.json", "hicache-archive-end.json"
FORMAT, VERSION = "hicache-archive", 1
BLOCK_NBYTES = 512
MAX_TEXT_NBYTES = 16 << 20
MAX_OBJECT_NBYTES = 4 << 30
"""A member that claims to be longer has a damaged header."""
END_BLOCKS = bytes(2 * BLOCK_NBYTES)


class Member(NamedTuple):
    """The header of a member: its name, and the length of its content in bytes.

    The name of a folder ends with a slash.
    """

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Planned:
    """What an archive is planned to have of one namespace.

    Attributes:
        objects: how many there were when the export began.
        object_nbytes: their length; 0 if they have several, or it is not known.
        described: the manifest, for readers; imports use the sealed one.
    """

    objects: int
    object_nbytes: int = 0
    described: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Head:
    """The first member.

    Attributes:
        created: when, in ISO format.
        by: name and version of the writer.
        namespaces: what is planned, by namespace.
    """

    created: str
    by: str
    namespaces: Mapping[str, Planned]

    def encode(self) -> bytes:
        """Its JSON text."""
        fields = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(fields, indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, text: bytes) -> Head:
        """The head of which ``text`` is the JSON.

        Raises:
            ConfigError: it is not one, or one of a later version.
        """
        try:
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                raise KeyError(FORMAT)
            if fields["version"] != VERSION:
                raise ConfigError(
                    f"the archive has version {fields['version']} of its format, this HiCache "
                    f"reads version {VERSION}: install a newer one"
                )
            planned = {str(name): _planned(own) for name, own in fields["namespaces"].items()}
            return cls(str(fields["created"]), str(fields["by"]), planned)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{HEAD} is damaged: this is not an archive of HiCache") from None


def _planned(fields: Mapping[str, Any]) -> Planned:
    """Raises ValueError for numbers that no archive has: nothing seals them."""
    objects, nbytes, described = (
        fields[name] for name in ("objects", "object_nbytes", "described")
    )
    if not (isinstance(objects, int) and isinstance(nbytes, int) and isinstance(described, dict)):
        raise ValueError(fields)
    if objects < 0 or not 0 <= nbytes <= MAX_OBJECT_NBYTES:
        raise ValueError(fields)
    return Planned(objects, nbytes, described)


def padding(nbytes: int) -> int:
    """Bytes of zeros after a content of ``nbytes``."""
    return -nbytes % BLOCK_NBYTES


def pack(name: str, nbytes: int, mtime: float) -> bytes:
    """The header of a member.

    Args:
        name: of the member.
        nbytes: length of its content.
        mtime: when it was written, seconds since the epoch.
    """
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = nbytes, int(mtime), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def unpack(block: bytes | bytearray | memoryview) -> Member | None:
    """The member whose header is ``block``; None if it is not a header."""
    if bytes(block[257:262]) != b"ustar":
        return None
    try:
        info = tarfile.TarInfo.frombuf(bytes(block), "ascii", "replace")
    except tarfile.HeaderError:
        return None
    if info.isdir():  # of an archive that tar has packed anew
        return Member(f"{info.name}/", 0)
    return Member(info.name, info.size) if 0 <= info.size <= MAX_OBJECT_NBYTES else None
