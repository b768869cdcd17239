"""The fingerprint of a model's files: what changes it, what does not."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from hicache_core.errors import SpecError
from hicache_core.kv.fingerprint import EDGE_NBYTES, WHOLE_FILE_NBYTES, fingerprint_of_files


def write(directory: Path, **files: bytes) -> list[Path]:
    directory.mkdir(exist_ok=True)
    paths = []
    for name, content in files.items():
        path = directory / name.replace("_", ".", 1)
        path.write_bytes(content)
        paths.append(path)
    return paths


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_equal_files_elsewhere_and_in_another_order_are_the_same_model(tmp_path: Path) -> None:
    one = write(tmp_path / "one", config_json=b"{}", model_bin=b"weights")
    two = write(tmp_path / "two", config_json=b"{}", model_bin=b"weights")
    fingerprint = fingerprint_of_files(one)
    assert fingerprint == fingerprint_of_files(str(path) for path in reversed(two))
    assert len(fingerprint) == 32


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    content = bytes(range(256))
    seen = {
        fingerprint_of_files(write(tmp_path, model_bin=flipped(content, at))) for at in range(256)
    }
    assert len(seen) == 256
    assert fingerprint_of_files(write(tmp_path, model_bin=content)) not in seen


def test_names_and_sizes_count(tmp_path: Path) -> None:
    seen = {
        fingerprint_of_files(write(tmp_path, a_bin=b"x", b_bin=b"")),
        fingerprint_of_files(write(tmp_path, a_bin=b"", b_bin=b"x")),
        fingerprint_of_files(write(tmp_path, a_bin=b"x", c_bin=b"")),
        fingerprint_of_files(write(tmp_path, a_bin=b"x")),
    }
    assert len(seen) == 4


def test_of_a_large_file_the_edges_and_the_header_count_whole(tmp_path: Path) -> None:
    nbytes = WHOLE_FILE_NBYTES + 12345
    header = struct.pack("<Q", 3 * EDGE_NBYTES)
    content = header + bytes(nbytes - len(header))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    before = fingerprint_of_files([path])
    for at in (0, EDGE_NBYTES - 1, 2 * EDGE_NBYTES + 5, 3 * EDGE_NBYTES + 7, nbytes - EDGE_NBYTES):
        path.write_bytes(flipped(content, at))
        assert fingerprint_of_files([path]) != before, f"byte {at} does not count"


def test_a_header_length_that_cannot_be_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * (WHOLE_FILE_NBYTES + 1))
    assert fingerprint_of_files([path]) == fingerprint_of_files([path])


def test_no_files_and_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "one", model_bin=b"")
    (other,) = write(tmp_path / "two", model_bin=b"")
    with pytest.raises(SpecError):
        fingerprint_of_files([])
    with pytest.raises(SpecError, match="distinct names"):
        fingerprint_of_files([path, other])


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fingerprint_of_files([tmp_path / "absent.bin"])
