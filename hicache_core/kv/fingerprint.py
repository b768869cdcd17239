"""Identity of a model: its config and weights, not the name under which it is served."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from hicache_core.errors import SpecError

WHOLE_FILE_NBYTES = 8 << 20
EDGE_NBYTES = 1 << 20
N_SAMPLES = 256
SAMPLE_NBYTES = 4096
MAX_HEADER_NBYTES = 100 << 20


def fingerprint_of_files(paths: Iterable[str | PathLike[str]]) -> str:
    """A digest of the files that make a model, 32 hex digits.

    Of every file it reads the name (without its directory), the size, and

    - up to 8 MiB: all bytes;
    - beyond: the first and the last MiB, 256 blocks of 4 KiB at even distances, and the whole
      header of a safetensors file.

    So a config, a tokenizer and small weights are covered completely. Large weights are sampled,
    to keep the start of a server short. The sample differs for another model, another training run
    or another quantisation, but not for an edit of a few tensors that misses every block and keeps
    the size. The order of ``paths`` does not matter.

    Args:
        paths: config and weights; adapters are named by requests (``Namespace.lora_id``) instead.

    Raises:
        SpecError: no path was given, or two files have the same name.
        OSError: a file cannot be read.
    """
    files = sorted((Path(path) for path in paths), key=lambda path: path.name)
    names = [path.name for path in files]
    if not files or len(set(names)) != len(names):
        raise SpecError(f"a fingerprint needs files of distinct names; got {names}")
    digest = hashlib.sha256(b"hicache model fingerprint 1\n")
    for path in files:
        content = hashlib.sha256()
        with path.open("rb") as file:
            nbytes = file.seek(0, 2)
            for start, stop in _ranges(file, nbytes, path.suffix):
                file.seek(start)
                content.update(file.read(stop - start))
        digest.update(f"{len(path.name)} {path.name} {nbytes} {content.hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def _ranges(file: BinaryIO, nbytes: int, suffix: str) -> list[tuple[int, int]]:
    """The byte ranges that count.

    ::

        0      1 MiB                                     nbytes - 1 MiB    nbytes
        |-edge--|  .   .   .   .   (samples)  .   .   .   .  |----edge-------|
        |-safetensors header--|
    """
    if nbytes <= WHOLE_FILE_NBYTES:
        return [(0, nbytes)]
    head = EDGE_NBYTES
    if suffix == ".safetensors":
        file.seek(0)
        header_nbytes = int.from_bytes(file.read(8), "little")
        head = max(head, min(8 + header_nbytes, nbytes, MAX_HEADER_NBYTES))
    step = nbytes // N_SAMPLES
    samples = [(i * step, i * step + SAMPLE_NBYTES) for i in range(1, N_SAMPLES)]
    return [(0, head), *samples, (nbytes - EDGE_NBYTES, nbytes)]
