"""Which model pages come from: its files where they are here, else its name, said plainly."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicache_core.integrations.foreign.identity import model_identity


def model(folder: Path, weights: str = "a", names: tuple[str, ...] = ("model.safetensors",)) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"layers": 2}')
    for name in names:
        (folder / name).write_text(weights + name)
    return str(folder)


def test_a_folder_is_known_by_its_files_wherever_it_is(tmp_path: Path) -> None:
    one = model_identity(model(tmp_path / "one"))
    assert len(one) == 32
    assert one == model_identity(model(tmp_path / "elsewhere" / "two"))
    assert one != model_identity(model(tmp_path / "three", weights="b"))
    config = tmp_path / "one" / "config.json"
    config.write_text('{"layers": 3}')
    assert one != model_identity(str(tmp_path / "one"))


@pytest.mark.parametrize(
    "names",
    [
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("pytorch_model.bin",),
        ("consolidated.00.pth",),
        ("model.Q4_K_M.gguf",),
    ],
)
def test_every_file_of_the_weights_counts(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = Path(model(tmp_path / "m", names=names))
    before = model_identity(str(folder))
    for name in names:
        (folder / name).write_text("others")
        changed = model_identity(str(folder))
        assert changed != before
        before = changed


def test_a_snapshot_of_links_is_the_same_model_as_a_plain_folder(tmp_path: Path) -> None:
    plain = Path(model(tmp_path / "plain"))
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "4f2a"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for n, file in enumerate(sorted(plain.iterdir())):
        (blobs / f"{n:064x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{n:064x}")
    assert model_identity(str(snapshot)) == model_identity(str(plain))


def test_a_single_file_is_a_model(tmp_path: Path) -> None:
    for name, text in (("a.gguf", "a"), ("b.gguf", "b")):
        (tmp_path / name).write_text(text)
    found = {model_identity(str(tmp_path / name)) for name in ("a.gguf", "b.gguf")}
    assert len(found) == 2
    assert not any(identity.startswith("name:") for identity in found)


def test_relative_paths_and_homes_are_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = model(tmp_path / "models" / "m")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_identity("models/m") == model_identity("~/models/m") == model_identity(absolute)


def test_what_is_not_here_is_known_by_its_name() -> None:
    assert model_identity("org/not-here-7b") == "name:org/not-here-7b"


def test_a_folder_without_weights_is_known_by_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the same relative name may be different models."""
    for folder in ("one", "two"):
        model(tmp_path / folder / "m", names=())
    monkeypatch.chdir(tmp_path / "one")
    one = model_identity("m")
    monkeypatch.chdir(tmp_path / "two")
    assert one == f"name:{tmp_path}/one/m" != model_identity("m")
