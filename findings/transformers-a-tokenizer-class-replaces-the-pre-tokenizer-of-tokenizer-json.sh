#!/usr/bin/env bash
# transformers 5.23.0, AutoTokenizer: with the class LlamaTokenizer it builds its own tokenizer from the vocabulary and
# the merges of tokenizer.json, and leaves out the normalizer and the pre-tokenizer that the file names.
#
# One would guess that tokenizer.json says it all, so that a router, a cache's command line or another process may load
# it with the tokenizers library alone and get the ids that the server computes with. For a folder whose class is the
# generic one the ids are equal. With LlamaTokenizer the same file gives other ids, and a prefix cache that is asked with
# those finds nothing. What is equal in any case is the backend of the loaded tokenizer, saved anew.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install transformers==5.23.0 tokenizers==0.23.3 2>/dev/null
"$work/venv/bin/python" - "$work" 2>/dev/null <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

TEXT = "one two"


def folder_with(tokenizer_class):
    """A byte pair tokenizer of single characters that splits at spaces and drops them."""
    words = ["<unk>", "<s>", "</s>", "\u2581", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = Path(sys.argv[1]) / tokenizer_class
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": tokenizer_class, "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


seen = {}
for tokenizer_class in ("PreTrainedTokenizerFast", "LlamaTokenizer"):
    folder = folder_with(tokenizer_class)
    loaded = AutoTokenizer.from_pretrained(folder)
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    ids = loaded(TEXT)["input_ids"]
    seen[tokenizer_class] = (ids == alone.encode(TEXT).ids, ids == backend.encode(TEXT).ids)
    print(f"{tokenizer_class}: transformers {loaded.tokenize(TEXT)}, the file alone {alone.encode(TEXT).tokens}")
assert seen == {"PreTrainedTokenizerFast": (True, True), "LlamaTokenizer": (False, True)}, seen
PY
# Seen:
#   PreTrainedTokenizerFast: transformers ['o', 'n', 'e', 't', 'w', 'o'], the file alone ['o', 'n', 'e', 't', 'w', 'o']
#   LlamaTokenizer: transformers ['▁', 'o', 'n', 'e', '▁', 't', 'w', 'o'], the file alone ['o', 'n', 'e', 't', 'w', 'o']
