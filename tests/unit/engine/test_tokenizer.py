"""Token ids of a text: those of transformers, whether it is asked or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from hicache_core.engine.tokenizer import encode

TEXT = " one  two <s> three,\nfour </s>five"

_ALONE = """
import sys
from pathlib import Path
from hicache_core.engine.tokenizer import encode
print(encode(Path(sys.argv[1]), sys.argv[2]))
assert "transformers" not in sys.modules and "torch" not in sys.modules
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hicache" / "tokenizers"


def saved(folder: Path, kind: str, **config: object) -> Path:
    """A folder with a byte pair tokenizer of single characters and the class ``kind``."""
    words = ["<unk>", "<s>", "</s>", "▁", "on", *map(chr, range(32, 127)), "\n"]
    vocabulary = {word: at for at, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("o", "n")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fields = {"tokenizer_class": kind, **special, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def by_transformers(folder: Path) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids: list[int] = tokenizer(TEXT)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer", "GemmaTokenizer"])
def test_the_ids_are_those_of_transformers_which_is_asked_once(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path / "model", kind)
    expected = by_transformers(folder)
    assert encode(folder, TEXT) == expected
    command = [sys.executable, "-c", _ALONE, str(folder), TEXT]
    again = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert json.loads(again.stdout) == expected


def test_transformers_does_not_always_take_the_file_as_it_is(tmp_path: Path) -> None:
    """Which is why the file of the folder is not read by itself."""
    folder = saved(tmp_path / "model", "LlamaTokenizer")
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert alone.encode(TEXT).ids != by_transformers(folder)


def test_a_folder_that_has_changed_is_another_tokenizer(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "PreTrainedTokenizerFast")
    before = encode(folder, TEXT)
    saved(folder, "LlamaTokenizer")
    assert encode(folder, TEXT) == by_transformers(folder) != before


def test_a_tokenizer_that_does_more_than_its_backend_is_not_kept(
    tmp_path: Path, cache: Path
) -> None:
    folder = saved(tmp_path / "model", "PreTrainedTokenizerFast", split_special_tokens=True)
    assert encode(folder, TEXT) == by_transformers(folder)
    assert not cache.exists()


def test_a_damaged_file_is_written_anew(tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path / "model", "PreTrainedTokenizerFast")
    expected = encode(folder, TEXT)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    assert encode(folder, TEXT) == expected
    assert kept.read_bytes() == whole


def test_a_place_that_cannot_be_written_does_not_matter(tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path / "model", "PreTrainedTokenizerFast")
    cache.parent.mkdir(parents=True)
    cache.write_text("a file, where a folder is needed")
    assert encode(folder, TEXT) == by_transformers(folder)
