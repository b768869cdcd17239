"""``hicache ls``, ``du``, ``get``, ``rm``, ``clear``, ``pin``, ``usage``: alike on all backends."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hicache_core.build.backends import bare_backend
from hicache_core.cli._stored import size_words
from hicache_core.kv.keys import describe_namespace, namespace_digest
from hicache_core.kv.spec import KVSpec
from hicache_core.storage.base import Listable
from hicache_core.storage.manifest import Manifest, manifest_key, manifest_page
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.testing.harness import required
from hicache_core.types import BackendContext
from tests.servers.valkey import Valkey, running
from tests.servers.weed import Weed
from tests.servers.weed import settings as weed_settings
from tests.unit.cli.test_cli import in_process
from tests.unit.manifests import write_manifest
from tests.unit.storage.test_scrub import flipped, key_of, sealed

Capsys = pytest.CaptureFixture[str]
Run = Callable[..., tuple[int, str, str]]

SPEC = KVSpec.mha(num_layers=2, num_heads=2, head_dim=8, dtype="bfloat16", fingerprint="m1")
MANIFEST = Manifest.of(describe_namespace(SPEC.identity(), 16, "page_first"))
CACHE, OTHER = MANIFEST.namespace, "b" * 16
NBYTES = HEADER_NBYTES + SPEC.page_nbytes(16)
KEYS = [key_of(n, CACHE) for n in range(4)]
OTHERS = [key_of(n, OTHER) for n in range(2)]


@dataclass(frozen=True)
class Shop:
    """A store with the pages of a cache and its manifest, and two of a cache without one."""

    name: str
    settings: dict[str, Any]

    def held(self) -> list[str]:
        with closing(bare_backend(self.name, self.settings, BackendContext("0" * 16))) as backend:
            backend.open()
            return sorted(required(backend, Listable).list_keys(""))

    def fill(self) -> None:
        with closing(bare_backend(self.name, self.settings, BackendContext("0" * 16))) as backend:
            backend.open()
            for key in KEYS:
                backend.set(key, sealed(key, NBYTES - HEADER_NBYTES))
            for key in OTHERS:
                backend.set(key, sealed(key, 36))
            assert write_manifest(SealedBackend(backend), MANIFEST, NBYTES - HEADER_NBYTES)


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    server = Weed(tmp_path_factory.mktemp("weed"))
    yield server
    server.close()


@pytest.fixture(params=["file", "redis", "s3", "chain"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Shop:
    file = {"path": str(tmp_path / "kv"), "io_threads": 1}
    prefix = uuid.uuid4().hex
    settings: dict[str, Any] = file
    if request.param == "redis":
        url = request.getfixturevalue("valkey").url
        settings = {"url": url, "key_prefix": f"{prefix}:"}
    elif request.param == "s3":
        url = request.getfixturevalue("weed").url
        settings = weed_settings(url, prefix=f"{prefix}/")
    elif request.param == "chain":
        other = {"backend": "file", "name": "far", "config": {"path": str(tmp_path / "far")}}
        settings = {"links": [{"backend": "file", "config": file}, other]}
    made = Shop(request.param, settings)
    made.fill()
    return made


@pytest.fixture
def files(tmp_path: Path) -> Shop:
    made = Shop("file", {"path": str(tmp_path / "kv"), "io_threads": 1})
    made.fill()
    return made


@pytest.fixture
def run(capsys: Capsys) -> Run:
    """Runs a command on a store."""

    def on(shop: Shop, command: str, *words: str) -> tuple[int, str, str]:
        config = json.dumps(shop.settings)
        return in_process(capsys, command, shop.name, *words, "--config", config)

    return on


def test_ls_says_which_caches_a_store_holds(shop: Shop, run: Run) -> None:
    status, out, _ = run(shop, "ls")
    assert status == 0
    header, cache, other = out.splitlines()
    assert header.split() == ["NAMESPACE", "OBJECTS", "SIZE", "LAST", "WRITTEN", "WHAT"]
    assert cache.split()[:2] == [CACHE, "5"]
    assert "model m1, page size 16, page_first, bfloat16, layers [0, 2], heads [0, 2, 2]" in cache
    assert other.split()[:2] == [OTHER, "2"]
    assert other.endswith("no manifest")


def test_ls_as_json_has_every_field_of_the_manifest(shop: Shop, run: Run) -> None:
    status, out, _ = run(shop, "ls", "--json")
    cache, other = json.loads(out)["namespaces"]
    assert (status, cache["namespace"], cache["objects"]) == (0, CACHE, 5)
    assert cache["nbytes"] == 5 * NBYTES
    assert cache["manifest"]["model_fingerprint"] == "m1"
    assert cache["manifest"]["page_size"] == 16
    assert (other["nbytes"], other["manifest"]) == (200, None)


def test_ls_of_a_namespace_lists_its_keys(shop: Shop, run: Run) -> None:
    status, out, _ = run(shop, "ls", CACHE)
    assert (status, sorted(out.split())) == (0, sorted([*KEYS, manifest_key(CACHE)]))
    status, out, _ = run(shop, "ls", OTHER, "--json")
    assert (status, sorted(json.loads(out))) == (0, sorted(OTHERS))
    status, out, err = run(shop, "ls", "c" * 16)
    assert (status, out, err) == (1, "", f"no object has namespace {'c' * 16}\n")
    status, out, _ = run(shop, "ls", "c" * 16, "--json")
    assert (status, json.loads(out)) == (1, [])


def test_du_adds_up_the_bytes_of_each_namespace(shop: Shop, run: Run) -> None:
    status, out, _ = run(shop, "du")
    rows = [line.split()[0] for line in out.splitlines()[1:]]
    assert (status, rows) == (0, [f"{5 * NBYTES:,}", "200", f"{5 * NBYTES + 200:,}"])
    status, out, _ = run(shop, "du", "--json")
    said = json.loads(out)
    assert said["namespaces"] == {CACHE: 5 * NBYTES, OTHER: 200}
    assert said["nbytes"] == 5 * NBYTES + 200


def test_usage_says_what_the_backend_knows_of_itself(shop: Shop, run: Run) -> None:
    status, out, _ = run(shop, "usage", "--json")
    said = json.loads(out)
    assert status == 0
    assert (said["used_nbytes"], said["objects"]) == (5 * NBYTES + 200, 7)
    status, out, _ = run(shop, "usage")
    assert ["objects", "7"] in [line.split() for line in out.splitlines()]


def test_the_limit_of_a_file_store_is_shown(files: Shop, run: Run) -> None:
    limited = Shop("file", {**files.settings, "max_nbytes": "1GB"})
    status, out, _ = run(limited, "usage")
    assert status == 0
    assert out.splitlines()[2].split() == ["limit", "1,000,000,000", "1", "GB"]


def test_get_says_what_an_object_is(shop: Shop, run: Run) -> None:
    status, out, _ = run(shop, "get", KEYS[0])
    assert status == 0
    assert f"namespace  {CACHE}\n" in out
    assert f"bytes      {NBYTES:,}: header 64, payload {NBYTES - 64:,}\n" in out
    assert "seal       good" in out
    status, out, _ = run(shop, "get", manifest_key(CACHE), "--json")
    said = json.loads(out)
    assert (status, said["seal"], said["nbytes"]) == (0, "good", NBYTES)
    assert said["manifest"]["layout"] == "page_first"


def test_get_writes_an_object_as_it_is_stored_or_without_its_header(
    shop: Shop, run: Run, tmp_path: Path
) -> None:
    whole, payload = tmp_path / "whole", tmp_path / "payload"
    assert run(shop, "get", KEYS[1], "--out", str(whole))[0] == 0
    assert whole.read_bytes() == sealed(KEYS[1], NBYTES - 64)
    assert run(shop, "get", KEYS[1], "--out", str(payload), "--payload")[0] == 0
    assert payload.read_bytes() == whole.read_bytes()[64:]


def test_get_of_what_is_not_there_or_damaged_is_status_1(files: Shop, run: Run) -> None:
    absent = key_of(9, CACHE)
    assert run(files, "get", absent) == (1, "", f"no object has the key {absent}\n")
    with closing(bare_backend("file", files.settings, BackendContext("0" * 16))) as backend:
        backend.open()
        backend.delete([KEYS[0]])
        backend.set(KEYS[0], flipped(KEYS[0], 100, 90))
        backend.set("alien", b"x")
    status, out, _ = run(files, "get", KEYS[0])
    assert (status, "seal       damaged: the checksum differs" in out) == (1, True)
    status, out, _ = run(files, "get", "alien", "--json")
    assert (status, json.loads(out)["seal"]) == (1, "unknown")
    assert KEYS[0] in files.held(), "a command that reads removes nothing"


def test_rm_removes_keys_or_a_namespace_and_says_how_many(shop: Shop, run: Run) -> None:
    absent = key_of(9, CACHE)
    words = [KEYS[0], KEYS[1], absent, KEYS[0]]  # one is named twice, and counts once
    assert run(shop, "rm", *words, "--yes")[:2] == (0, "2 removed\n")
    assert run(shop, "rm", absent, "--yes")[:2] == (1, "0 removed\n")
    status, out, _ = run(shop, "rm", "--namespace", OTHER, "--yes", "--json")
    assert (status, json.loads(out)) == (0, {"backend": shop.name, "removed": 2})
    assert shop.held() == sorted([*KEYS[2:], manifest_key(CACHE)])


def test_clear_removes_everything(shop: Shop, run: Run) -> None:
    assert run(shop, "clear", "--yes")[:2] == (0, "7 removed\n")
    assert shop.held() == []
    assert run(shop, "ls")[:2] == (1, "the store holds no object\n")
    assert run(shop, "du", "--json")[0] == 0


@pytest.mark.parametrize("words", [["rm", KEYS[0]], ["rm", "--namespace", CACHE], ["clear"]])
@pytest.mark.parametrize(("answer", "status"), [("n\n", 1), ("", 1), ("y\n", 0)])
def test_nothing_is_removed_before_the_question_is_answered(
    files: Shop,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    answer: str,
    status: int,
) -> None:
    asked = []

    def reply(question: str, *_args: object, **_options: object) -> str:
        asked.append(question)
        if not answer:
            raise EOFError
        return answer.strip()

    monkeypatch.setattr("click.termui.visible_prompt_func", reply)
    before = files.held()
    assert run(files, words[0], *words[1:])[0] == status
    assert len(asked) == 1
    assert asked[0].startswith("Remove ")
    assert (files.held() == before) == (status == 1)


def test_pins_of_a_file_store_last_and_can_be_ended(files: Shop, run: Run) -> None:
    assert run(files, "pin", *KEYS[:2], key_of(9, CACHE))[:2] == (0, "2 pinned for 3600 s\n")
    status, out, _ = run(files, "pin", "--namespace", OTHER, "--for", "60", "--json")
    assert (status, json.loads(out)) == (0, {"backend": "file", "pinned": 2, "objects": 2})
    assert run(files, "pin", "--remove", KEYS[0])[:2] == (0, "1 no longer pinned\n")
    assert run(files, "pin", key_of(9, CACHE))[0] == 1


def test_a_pin_that_belongs_to_its_process_lasts_as_long_as_the_command(
    valkey: Valkey, run: Run
) -> None:
    shop = Shop("redis", {"url": valkey.url, "key_prefix": f"{uuid.uuid4().hex}:"})
    shop.fill()
    began = time.monotonic()
    status, out, err = run(shop, "pin", KEYS[0], "--for", "0.5")
    assert (status, out) == (0, "1 pinned for 0.5 s\n")
    assert "keeps a pin only while this command runs" in err
    assert time.monotonic() - began >= 0.5
    status, _, err = run(shop, "pin", "--remove", KEYS[0])
    assert (status, "ends a pin with the process that set it" in err) == (3, True)


def test_what_s3_cannot_do_is_said(weed: Weed, run: Run) -> None:
    shop = Shop("s3", weed_settings(weed.url, prefix=f"{uuid.uuid4().hex}/"))
    status, _, err = run(shop, "pin", KEYS[0])
    assert status == 3
    assert "backend 's3' cannot pin objects (it is not Pins)" in err


BARE = """
from hicache_core.storage.base import StorageBackend
class Bare(StorageBackend):
    name = "bare"
    def get(self, key): return None
    def exists(self, key): return False
    def set(self, key, value): pass
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls"], "can neither list its keys nor report its usage"),
        (["ls", CACHE], "cannot list its keys"),
        (["du"], "can neither list its keys nor report its usage"),
        (["usage"], "nor does it report what it holds"),
        (["rm", KEYS[0], "--yes"], "cannot delete"),
        (["rm", "--namespace", CACHE, "--yes"], "cannot remove a namespace"),
        (["clear", "--yes"], "cannot be cleared"),
        (["pin", KEYS[0]], "cannot pin objects"),
    ],
)
def test_what_a_backend_cannot_do_is_one_sentence_and_status_3(
    tmp_path: Path, run: Run, words: list[str], said: str
) -> None:
    (tmp_path / "bare.py").write_text(BARE)
    where = {"backend_name": "bare", "module_path": str(tmp_path / "bare.py"), "class_name": "Bare"}
    status, out, err = run(Shop("dynamic", where), words[0], *words[1:])
    assert (status, out) == (3, "")
    assert "backend 'bare'" in err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["ls"], ["du"], ["usage"], ["get", "k"], ["ls", "n"], ["clear"]])
def test_no_command_makes_a_store(tmp_path: Path, run: Run, words: list[str]) -> None:
    status, out, err = run(Shop("file", {"path": str(tmp_path / "typo")}), words[0], *words[1:])
    assert (status, out) == (2, "")
    assert "typo holds no store of the file backend; check path" in err
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_said_to_be_read_only_is_not_changed(files: Shop, run: Run) -> None:
    locked = Shop("file", {**files.settings, "read_only": True})
    assert run(locked, "ls")[0] == 0
    for words in (["rm", KEYS[0], "--yes"], ["clear", "--yes"], ["pin", KEYS[0]]):
        status, out, err = run(locked, words[0], *words[1:])
        assert (status, out) == (2, "")
        assert "is read_only, and the command would change its store" in err
    assert len(files.held()) == 7


def test_lines_are_whole_when_they_are_piped(files: Shop, run: Run) -> None:
    _, out, _ = run(files, "ls")
    assert max(map(len, out.splitlines())) > 100
    assert "heads [0, 2, 2]" in out


def test_sizes_have_three_digits_and_a_unit() -> None:
    said = {0: "0 B", 999: "999 B", 1000: "1 kB", 999_499: "999 kB", 999_500: "1 MB"}
    said |= {1_234_567: "1.23 MB", 5 * 10**12: "5 TB", 10**18: "1e+03 PB"}
    assert {n: size_words(n) for n in said} == said
    assert size_words(None) == "–"


def test_groups_and_engines_are_named_in_words(tmp_path: Path, run: Run) -> None:
    shop = Shop("file", {"path": str(tmp_path / "kv"), "io_threads": 1})
    described = describe_namespace({**SPEC.identity(), "group": "swa"}, 16, "layer_first")
    with closing(bare_backend("file", shop.settings, BackendContext("0" * 16))) as backend:
        backend.open()
        made = manifest_page(described, NBYTES, {"window": 512, "page_size": 16})
        assert made is not None
        assert SealedBackend(backend).batch_set([made[0]], [made[1]]) == 1
    _, out, _ = run(shop, "ls")
    assert namespace_digest(described) in out
    assert "group swa: a window of 512" in out


def test_the_help_of_each_names_the_backend_alike(capsys: Capsys) -> None:
    for name in ("ls", "du", "get", "rm", "clear", "pin", "usage", "scrub", "doctor"):
        status, out, _ = in_process(capsys, name, "--help")
        assert status == 0
        assert f"Usage: hicache {name} [OPTIONS] NAME" in out
        assert "--config JSON|@FILE" in out
        assert "--json" in out
