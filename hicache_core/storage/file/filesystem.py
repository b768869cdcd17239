"""Which file systems are on disks or in memory of this host."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_LOCAL = {
    0xEF53: "ext2, ext3, ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x794C7630: "overlay",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs",
}
"""Types of file systems whose calls end: no server and no other process has to answer them."""

_STATFS_NBYTES = 1024  # more than ``struct statfs`` has anywhere
_statfs = ctypes.CDLL(None, use_errno=True).statfs
_statfs.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
_statfs.restype = ctypes.c_int


def is_local(path: Path) -> bool:
    """Returns whether calls on files under ``path`` end without an answer from elsewhere.

    An unknown type is not local: NFS, FUSE, Lustre, Ceph, CIFS and the like may hang for ever. If
    ``path`` does not exist yet, its parent decides.
    """
    answer = ctypes.create_string_buffer(_STATFS_NBYTES)
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    if _statfs(os.fsencode(path), answer) != 0:
        return False
    # The type comes first: a long, of which some architectures fill 32 bits.
    return ctypes.c_ulong.from_buffer(answer).value & 0xFFFFFFFF in _LOCAL
