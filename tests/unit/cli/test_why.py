"""``hicache why``: which cache is meant, what it says, and its exit status."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hicache_core.cli.main import cli
from hicache_core.errors import HiCacheError
from hicache_core.kv.spec import KVSpec
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.manifest import Manifest
from hicache_core.types import Namespace
from tests.unit.storage.test_why import CONTEXT, MANIFEST, SALTED, keys_of, manifest_of, put

DOCS = Path(__file__).resolve().parents[3] / "docs" / "why-a-miss.md"
IDS = ",".join(map(str, range(1, 31)))
OTHER_MODEL = manifest_of(
    KVSpec.mha(num_layers=2, num_heads=2, head_dim=8, dtype="bfloat16", fingerprint="n2")
)


@pytest.fixture
def fill(tmp_path: Path) -> Callable[..., None]:
    """Stores leading pages of the prompt in ``kv-store``."""

    def store(
        manifest: Manifest = MANIFEST, request: Namespace | None = None, n_pages: int = 7
    ) -> None:
        config = FileConfig(path=tmp_path / "kv-store", io_threads=1)
        with closing(FileBackend(config, CONTEXT)) as backend:
            backend.open()
            put(backend, keys_of(manifest, request or Namespace())[:n_pages], manifest)

    return store


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs ``hicache why`` on the file backend in ``kv-store``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        settings = json.dumps({"path": "kv-store"})
        return CliRunner().invoke(
            cli, ["why", *arguments, "--backend", "file", "--config", settings]
        )

    return run


def document(result: Result) -> dict[str, object]:
    assert result.exit_code in (0, 1), result.output
    return dict(json.loads(result.output))


def test_a_stored_prompt_is_status_0_and_a_miss_status_1(
    fill: Callable[..., None], ask: Callable[..., Result]
) -> None:
    fill()
    stored = ask(IDS)
    assert stored.exit_code == 0
    assert "7 leading pages, 28 tokens" in stored.output
    missed = ask(IDS.replace("1,", "5,", 1))
    assert missed.exit_code == 1
    assert "never stored" in missed.output


def test_a_prompt_shorter_than_a_page_is_said_to_be_so_and_no_success(
    fill: Callable[..., None], ask: Callable[..., Result]
) -> None:
    fill()
    result = ask("1,2,3")
    assert result.exit_code == 1
    assert "shorter than a page" in result.output
    assert "not a miss" not in result.output


@pytest.mark.parametrize("prompt", [IDS, f"[{IDS}]", "@prompt.json", f" {IDS}, "])
def test_ids_are_given_in_any_way(
    fill: Callable[..., None], ask: Callable[..., Result], tmp_path: Path, prompt: str
) -> None:
    fill()
    (tmp_path / "prompt.json").write_text(f"[{IDS}]")
    assert document(ask(prompt, "--json"))["n_stored"] == 7


def test_a_salt_is_said(fill: Callable[..., None], ask: Callable[..., Result]) -> None:
    fill(request=SALTED)
    assert ask(IDS, "--cache-salt", "tenant-a").exit_code == 0
    result = ask(IDS, "--cache-salt", "tenant-a", "--extra-key", "x")
    assert "for         cache_salt 'tenant-a'" in result.output
    assert "other request namespace" in result.output


def test_which_of_several_caches_is_chosen_by_its_model(
    fill: Callable[..., None], ask: Callable[..., Result]
) -> None:
    fill(n_pages=2)
    fill(OTHER_MODEL)
    result = ask(IDS)
    assert isinstance(result.exception, HiCacheError)
    assert MANIFEST.namespace in str(result.exception)
    assert OTHER_MODEL.namespace in str(result.exception)
    assert ask(IDS, "--model-fingerprint", "n").exit_code == 0
    missed = ask(IDS, "--model-fingerprint", "m1")
    assert "2 leading pages" in missed.output
    assert "differs     model_fingerprint: m1 asked, n2 stored" in missed.output
    named = document(ask(IDS, "--namespace", OTHER_MODEL.namespace, "--json"))
    assert (named["n_stored"], named["looked_into"]) == (7, [MANIFEST.namespace])


def test_a_cache_that_stored_nothing_is_described_by_its_model(
    fill: Callable[..., None], ask: Callable[..., Result], tmp_path: Path
) -> None:
    """Its dtype is another: what is stored was stored by the server before the change."""
    fill()
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    result = ask(IDS, "--model", str(tmp_path), "--page-size", "4")
    assert result.exit_code == 1
    assert re.search(r"differs +components: .*float16.* asked, .*bfloat16.* stored", result.output)
    given = ("--model", str(tmp_path), "--page-size", "4", "--dtype", "bfloat16")
    assert ask(IDS, *given).exit_code == 0
    assert ask(IDS, *given, "--model-fingerprint", "m3").exit_code == 1


def test_a_text_is_tokenized(
    fill: Callable[..., None], ask: Callable[..., Result], tiny_folder: Path
) -> None:
    fill()
    found = document(ask("one two three four five", "--tokenizer", str(tiny_folder), "--json"))
    assert isinstance(found["n_tokens"], int)
    assert found["n_tokens"] > 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a text"], "add --tokenizer"),
        (["@nowhere"], "cannot read the file of the prompt"),
        (["[-1]"], "token ids go from 0"),
        ([IDS], "no cache fits; the store has: no manifest"),
        ([IDS, "--namespace", "xyz"], "16 hex digits"),
        ([IDS, "--model", "."], "config.json"),
    ],
)
def test_a_mistake_is_explained(
    ask: Callable[..., Result], tmp_path: Path, arguments: list[str], said: str
) -> None:
    if "--model" in arguments:
        arguments = [*arguments, "--model-fingerprint", "m1"]
    with closing(FileBackend(FileConfig(path=tmp_path / "kv-store"), CONTEXT)) as empty:
        empty.open()
    result = ask(*arguments)
    assert isinstance(result.exception, HiCacheError), result.output
    assert said in str(result.exception)


def test_the_example_of_the_docs_is_what_it_prints(
    fill: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(n_pages=5)
    fill(manifest_of(layout="layer_first"))
    command, shown = re.findall(r"```console\n\$ (.*?)\n(.*?)```", DOCS.read_text(), re.DOTALL)[0]
    words = [IDS if word.startswith("1,2") else word for word in shlex.split(command)[2:]]
    assert CliRunner().invoke(cli, ["why", *words]).output == shown
