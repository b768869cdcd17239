"""``hicache copy``, ``export`` and ``import``: reports, exit statuses, and which objects move."""

from __future__ import annotations

import fcntl
import io
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from hicache_core.kv.spec import KVSpec
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.manifest import Manifest
from hicache_core.types import Namespace
from tests.servers.valkey import running
from tests.unit.cli.test_cli import in_process
from tests.unit.storage.test_moving import contents
from tests.unit.storage.test_scrub import flipped, key_of
from tests.unit.storage.test_why import CONTEXT, MANIFEST, SALTED, keys_of, manifest_of, put

Capsys = pytest.CaptureFixture[str]
DOCS = Path(__file__).resolve().parents[3] / "docs" / "moving-stores.md"
IDS = ",".join(map(str, range(1, 31)))
OTHER_MODEL = manifest_of(
    KVSpec.mha(num_layers=2, num_heads=2, head_dim=8, dtype="bfloat16", fingerprint="n2")
)


class Stores:
    """File stores in a folder.

    Attributes:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, name: str) -> str:
        """The settings of a store, for a command line."""
        return json.dumps({"path": str(self.folder / name)})

    def do(self, name: str, work: Callable[[StorageBackend], None]) -> None:
        """Opens a store for ``work``."""
        with closing(FileBackend(FileConfig(path=self.folder / name), CONTEXT)) as backend:
            backend.open()
            work(backend)

    def fill(
        self, name: str, keys: Sequence[str] | None = None, manifest: Manifest = MANIFEST
    ) -> None:
        """Stores pages and their manifest."""
        chosen = keys_of(manifest) if keys is None else keys
        self.do(name, lambda backend: put(backend, chosen, manifest))

    def contents(self, name: str) -> dict[str, bytes]:
        """All objects of a store."""
        found: dict[str, bytes] = {}
        self.do(name, lambda backend: found.update(contents(backend)))
        return found


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    """A store ``a`` with seven pages and a manifest; others are created."""
    stores = Stores(tmp_path)
    stores.fill("a")
    return stores


def between(stores: Stores, one: str = "a", other: str = "b") -> list[str]:
    return [
        *("file", "--from-config", stores.config(one)),
        *("file", "--to-config", stores.config(other)),
    ]


def test_a_copy_is_whole_and_a_second_one_copies_nothing(stores: Stores, capsys: Capsys) -> None:
    status, out, err = in_process(capsys, "copy", *between(stores))
    assert (status, err) == (0, "")
    assert "8 copied; " in out
    assert f"{MANIFEST.namespace} (model m1, page size 4" in out
    assert stores.contents("b") == stores.contents("a")
    status, out, _ = in_process(capsys, "copy", *between(stores), "--json")
    told = json.loads(out)
    assert (status, told["objects"]["copied"], told["objects"]["present"]) == (0, 0, 8)


def test_a_damaged_page_is_named_and_status_1(stores: Stores, capsys: Capsys) -> None:
    bad = keys_of(MANIFEST)[3]

    def damage(backend: StorageBackend) -> None:
        backend.delete([bad])
        backend.set(bad, flipped(bad, 192, 100))

    stores.do("a", damage)
    status, out, err = in_process(capsys, "copy", *between(stores))
    assert status == 1
    assert f"damaged   {bad}: corrupt" in err
    assert "7 copied, 1 damaged; " in out
    assert bad not in stores.contents("b")
    assert bad in stores.contents("a"), "a copy changes nothing where it reads"


def test_only_the_named_caches_are_copied(stores: Stores, capsys: Capsys) -> None:
    stores.fill("a", manifest=OTHER_MODEL)
    for n, option in enumerate(
        (("--namespace", OTHER_MODEL.namespace), ("--model-fingerprint", "n"))
    ):
        status, _, _ = in_process(capsys, "copy", *between(stores, "a", f"b{n}"), *option)
        assert status == 0
        copied = stores.contents(f"b{n}")
        assert len(copied) == 8
        assert {key.partition("/")[0] for key in copied} == {OTHER_MODEL.namespace}
    status, _, err = in_process(capsys, "copy", *between(stores), "--model-fingerprint", "x")
    assert status == 2
    assert "no cache of model x; it has: " in err
    assert MANIFEST.namespace in err
    status, _, err = in_process(capsys, "copy", *between(stores), "--namespace", "f" * 16)
    assert (status, "nothing of namespace ffffffffffffffff" in err) == (2, True)


def test_prompts_bring_their_leading_pages_only(
    stores: Stores, capsys: Capsys, tmp_path: Path
) -> None:
    salted = keys_of(MANIFEST, SALTED)
    stores.fill("a", salted)
    asked = [*between(stores), "--prompt", IDS, "--cache-salt", "tenant-a"]
    status, out, _ = in_process(capsys, "copy", *asked)
    assert status == 0
    assert "prompt 1: 7 of its 7 pages are stored" in out
    assert set(salted) < set(stores.contents("b"))
    assert not set(keys_of(MANIFEST)) & set(stores.contents("b"))
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'[{IDS}]\n\n{{"input_ids": [1, 2, 3, 4, 9]}}\n')
    status, out, _ = in_process(
        capsys, "copy", *between(stores, "a", "c"), "--prompts", str(file), "--json"
    )
    assert status == 0
    assert json.loads(out)["prompts"] == [{"pages": 7, "stored": 7}, {"pages": 1, "stored": 1}]
    assert set(keys_of(MANIFEST, Namespace())) < set(stores.contents("c"))


def test_what_a_line_of_prompts_cannot_be_is_said(
    stores: Stores, capsys: Capsys, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    for line, said in (("{}", "prompts.jsonl:1: a prompt is"), ("hello", "add --tokenizer")):
        file.write_text(line + "\n")
        status, _, err = in_process(capsys, "copy", *between(stores), "--prompts", str(file))
        assert (status, said in err) == (2, True)
    status, _, err = in_process(capsys, "copy", *between(stores), "--cache-salt", "x")
    assert (status, "are of prompts" in err) == (2, True)


def test_nothing_is_created_for_a_store_that_is_not_there(tmp_path: Path, capsys: Capsys) -> None:
    stores = Stores(tmp_path)
    status, _, err = in_process(capsys, "copy", *between(stores, "typo", "b"))
    assert (status, "holds no store" in err) == (2, True)
    status, _, _ = in_process(
        capsys, "export", "file", str(tmp_path / "x.tar"), "--config", stores.config("typo")
    )
    assert status == 2
    assert list(tmp_path.iterdir()) == []


def test_a_copy_goes_from_file_to_redis_and_back(stores: Stores, capsys: Capsys) -> None:
    with running() as server:
        redis = json.dumps({"url": server.url})
        there = ["file", "redis", "--from-config", stores.config("a"), "--to-config", redis]
        assert in_process(capsys, "copy", *there)[0] == 0
        back = ["redis", "file", "--from-config", redis, "--to-config", stores.config("b")]
        assert in_process(capsys, "copy", *back)[0] == 0
    assert stores.contents("b") == stores.contents("a")


def test_an_archive_is_written_and_read(stores: Stores, capsys: Capsys) -> None:
    file = str(stores.folder / "cache.tar")
    given = ["export", "file", file, "--config", stores.config("a")]
    status, out, err = in_process(capsys, *given)
    assert (status, err) == (0, "")
    assert "8 copied; " in out
    status, _, err = in_process(capsys, *given)
    assert status == 2
    assert "cache.tar exists: add --resume" in err
    taken = ["import", file, "file", "--config", stores.config("b")]
    status, out, _ = in_process(capsys, *taken)
    assert (status, "8 copied; " in out, "model m1" in out) == (0, True, True)
    assert stores.contents("b") == stores.contents("a")
    status, out, _ = in_process(capsys, *taken)
    assert (status, "0 copied, 8 there already; " in out) == (0, True)


def test_of_a_half_archive_the_rest_is_counted_and_an_export_goes_on(
    stores: Stores, capsys: Capsys
) -> None:
    file = stores.folder / "cache.tar"
    given = ["export", "file", str(file), "--config", stores.config("a")]
    assert in_process(capsys, *given)[0] == 0
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    taken = ["import", str(file), "file", "--config", stores.config("b"), "--json"]
    status, out, _ = in_process(capsys, *taken)
    told = json.loads(out)
    n_there = told["objects"]["copied"]
    assert status == 1
    assert 0 < n_there < 8
    assert told["cut"] + told["missing"] == 8 - n_there
    assert "not whole" in told["stopped"]
    status, out, _ = in_process(capsys, *given, "--resume", "--json")
    assert status == 0
    assert json.loads(out)["objects"]["present"] == n_there
    assert in_process(capsys, *taken)[0] == 0
    assert stores.contents("b") == stores.contents("a")


def test_an_archive_of_another_model_is_refused(stores: Stores, capsys: Capsys) -> None:
    file = str(stores.folder / "cache.tar")
    in_process(capsys, "export", "file", file, "--config", stores.config("a"))
    taken = ["import", file, "file", "--config", stores.config("b"), "--model-fingerprint"]
    status, out, err = in_process(capsys, *taken, "m2")
    assert status == 1
    assert "0 copied, 8 refused; " in out
    assert "its model is m1, not m2" in err
    assert stores.contents("b") == {}
    assert in_process(capsys, *taken, "m1")[0] == 0


def test_an_archive_goes_from_stdout_to_stdin(stores: Stores) -> None:
    """Both commands as processes, joined by a pipe."""
    hicache = [sys.executable, "-m", "hicache_core"]
    with subprocess.Popen(
        [*hicache, "export", "file", "-", "--config", stores.config("a")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as export:
        took = subprocess.run(
            [*hicache, "import", "-", "file", "--config", stores.config("b"), "--json"],
            stdin=export.stdout,
            capture_output=True,
            timeout=60,
            check=True,
        )
        assert export.stderr is not None
        assert b"8 copied; " in export.stderr.read()
    assert export.returncode == 0
    assert json.load(io.BytesIO(took.stdout))["objects"]["copied"] == 8
    assert stores.contents("b") == stores.contents("a")


def test_what_is_not_an_archive_is_one_line(stores: Stores, capsys: Capsys) -> None:
    file = stores.folder / "x.tar"
    file.write_bytes(b"not a tar")
    status, out, err = in_process(
        capsys, "import", str(file), "file", "--config", stores.config("b")
    )
    assert (status, out) == (2, "")
    assert "not an archive of HiCache" in err
    assert err.count("\n") == 1
    assert not (stores.folder / "b").exists()


def test_the_commands_of_the_page_run(
    stores: Stores, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but ``warm``, which needs a server; tests/server/test_warm.py runs that."""
    monkeypatch.chdir(stores.folder)
    (stores.folder / "a").rename("kv-store")
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)
        for line in block.splitlines()
    ]
    run = [line for line in lines if " warm " not in line and "|" not in line]
    assert len(run) == len(lines) - 2 == 5
    with running() as server:
        for line in run:
            words = shlex.split(line.replace("redis://127.0.0.1:6379", server.url))
            assert in_process(capsys, *words[1:])[0] == 0, line
    assert stores.contents("other-store") == stores.contents("kv-store")


@pytest.mark.parametrize("how", ["copy", "export"])
def test_what_was_killed_goes_on_and_ends_whole(stores: Stores, capsys: Capsys, how: str) -> None:
    """A real process, killed as soon as it has written something; all of it is there in the end."""
    keys = [key_of(n, MANIFEST.namespace) for n in range(3000)]
    stores.fill("big", keys)
    file = stores.folder / "big.tar"
    words = {
        "copy": ["copy", *between(stores, "big")],
        "export": ["export", "file", str(file), "--config", stores.config("big")],
    }[how]
    written = stores.folder / "b" / "segments" / "00000001.seg" if how == "copy" else file
    with subprocess.Popen([sys.executable, "-m", "hicache_core", *words]) as process:
        until = time.monotonic() + 60
        while not written.exists() or written.stat().st_size < 50_000:
            assert process.poll() is None or written.exists()
            assert time.monotonic() < until
            time.sleep(0.001)
        process.kill()
    status, out, _ = in_process(
        capsys, *words, *(["--resume"] if how == "export" else []), "--json"
    )
    told = json.loads(out)["objects"]
    assert status == 0
    assert told["present"] > 0 or how == "copy"  # it may die before it publishes a batch
    assert told["present"] + told["copied"] == len(keys) + 1
    if how == "export":
        in_process(capsys, "import", str(file), "file", "--config", stores.config("b"))
    assert stores.contents("b") == stores.contents("big")


def test_two_exports_do_not_write_one_file(stores: Stores, capsys: Capsys, tmp_path: Path) -> None:
    file = tmp_path / "one.tar"
    words = ("export", "file", str(file), "--config", stores.config("a"))
    assert in_process(capsys, *words)[0] == 0
    before = file.read_bytes()
    with file.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        status, _, err = in_process(capsys, *words, "--resume")
    assert (status, file.read_bytes()) == (2, before)
    assert f"another export writes {file}; wait until it ends" in err
    assert in_process(capsys, *words, "--resume")[0] == 0


def test_what_a_target_with_a_limit_has_evicted_again_is_told(
    stores: Stores, capsys: Capsys, tmp_path: Path
) -> None:
    """It takes the second cache, and evicts the first one for it."""
    stores.fill("a", manifest=OTHER_MODEL)

    def small(name: str) -> str:
        blocks = 10  # of 4 KiB, one for each object; a cache has eight
        return json.dumps({"path": str(stores.folder / name), "max_nbytes": blocks * 4096})

    words = ("--from-config", stores.config("a"), "--to-config", small("b"), "--threads", "1")
    status, out, _ = in_process(capsys, "copy", "file", "file", *words, "--json")
    told = json.loads(out)
    gone = 16 - len(stores.contents("b"))
    assert gone >= 6
    assert (status, told["objects"]["copied"], told["gone"]) == (1, 16, gone)
    for namespace in (MANIFEST.namespace, OTHER_MODEL.namespace):
        part = str(tmp_path / f"{namespace}.tar")
        chosen = ("--config", stores.config("a"), "--namespace", namespace)
        assert in_process(capsys, "export", "file", part, *chosen)[0] == 0
        status, out, _ = in_process(capsys, "import", part, "file", "--config", small("c"))
        assert (status, "gone again" in out) == (0, False), "all of this one is there"
