"""A store of an engine says what its namespaces are, to the commands and to people."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hicache_core.cli.main import cli
from hicache_core.errors import ConfigError
from hicache_core.integrations.foreign.namespace import ForeignNamespace
from hicache_core.integrations.foreign.opening import open_store
from hicache_core.integrations.foreign.store import ForeignStore
from hicache_core.kv.keys import page_digests
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.manifest import Manifest, manifest_key, read_manifest
from hicache_core.storage.sealed import HEADER_NBYTES
from hicache_core.testing.faults import StuckBackend
from tests.unit.integrations.foreign_world import (
    NAMESPACE,
    NBYTES,
    keys_of,
    memory,
    opened,
    pages_of,
)

SGLANG = ForeignNamespace(
    "sglang", "0.5.23", "name:org/model", "page_first", 4, NBYTES, {"dtype": "bfloat16"}
)
TOKENS = b"".join(n.to_bytes(4, "little") for n in range(1, 31))


def settled(store: ForeignStore) -> None:
    deadline = time.monotonic() + 20
    while store.n_in_flight:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def manifest_in(backend: StorageBackend, namespace: ForeignNamespace) -> Manifest | None:
    return read_manifest(backend, namespace.digest)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    """Fills a file store as SGLang and another engine would, and runs commands on it."""
    settings = json.dumps({"path": str(tmp_path)})
    store = open_store("file", json.loads(settings), object_nbytes=NBYTES)
    for namespace in (SGLANG, NAMESPACE):
        store.describe(namespace)
    digests = page_digests(TOKENS, 4)
    keys = [SGLANG.key(digests[n : n + 32]) for n in range(0, len(digests), 32)]
    assert store.write(keys[:5], pages_of(range(5))).n_leading == 5
    assert store.write(keys_of(range(3)), pages_of(range(3))).n_leading == 3
    settled(store)
    store.close()

    def command(name: str, *arguments: str) -> Result:
        chosen = ["--config", settings]
        return CliRunner().invoke(cli, [name, *arguments, *chosen])

    return command


def test_why_looks_up_a_prompt_of_sglang_and_says_whose_pages_it_found(
    run: Callable[..., Result],
) -> None:
    prompt = ",".join(map(str, range(1, 31)))
    result = run("why", prompt, "--backend", "file", "--namespace", SGLANG.digest)
    assert "stored      5 leading pages, 20 tokens" in result.output
    assert (
        f"cache       {SGLANG.digest} (sglang 0.5.23, model 'org/model' by its name, not its "
        "weights, page size 4, page_first, 4,096 bytes a page, dtype bfloat16)"
    ) in result.output
    assert result.exit_code == 1


def test_why_says_that_it_cannot_know_the_keys_of_other_engines(
    run: Callable[..., Result],
) -> None:
    result = run("why", "1,2", "--backend", "file", "--namespace", NAMESPACE.digest)
    assert isinstance(result.exception, ConfigError)
    assert "names pages by hashes that only an engine computes" in str(result.exception)


def test_scrub_checks_the_pages_of_engines_and_says_whose_they_are(
    run: Callable[..., Result],
) -> None:
    result = run("scrub", "file")
    assert result.exit_code == 0, result.output
    assert "10 objects" in result.output
    assert f"{SGLANG.digest} (sglang 0.5.23, model 'org/model' by its name" in result.output
    assert f"{NAMESPACE.digest} (an engine 1, " in result.output


def test_a_manifest_states_engine_version_layout_and_length() -> None:
    backend = memory()
    store = opened(backend)
    assert store.describe(NAMESPACE) == NAMESPACE.digest
    settled(store)
    manifest = manifest_in(backend, NAMESPACE)
    assert manifest is not None
    assert manifest.told["engine_version"] == "1"
    assert manifest.fields["engine"] == "an engine"
    assert (manifest.fields["layout"], manifest.page_size) == ("page_first", 16)
    assert manifest.object_nbytes == HEADER_NBYTES + NBYTES
    assert Manifest.of(manifest.described).namespace == NAMESPACE.digest
    store.close()


@pytest.mark.parametrize("nbytes", [0, 1, 10_000])
def test_pages_of_any_length_have_a_manifest(nbytes: int) -> None:
    backend = memory()
    store = opened(backend)
    namespace = replace(NAMESPACE, object_nbytes=nbytes)
    store.describe(namespace)
    settled(store)
    manifest = manifest_in(backend, namespace)
    assert manifest is not None
    assert manifest.object_nbytes == (HEADER_NBYTES + nbytes if nbytes else 0)
    store.close()


def test_a_manifest_that_the_store_could_not_take_follows_with_a_later_write() -> None:
    backend = memory()
    stuck = StuckBackend(backend)
    store = opened(stuck, deadline_s=0.6, guarded=False)
    store.describe(NAMESPACE)
    settled(store)
    stuck.release()
    assert store.write(keys_of("a"), pages_of("a")).mask == [True]
    settled(store)
    assert manifest_in(backend, NAMESPACE) is not None
    store.close()


def test_a_namespace_that_was_cleared_gets_its_manifest_with_the_next_write() -> None:
    backend = memory()
    store = opened(backend, direct=True)
    store.describe(NAMESPACE)
    settled(store)
    assert store.clear(f"{NAMESPACE.digest}/") == 1
    assert manifest_in(backend, NAMESPACE) is None
    assert store.write(keys_of("a"), pages_of("a")).mask == [True]
    settled(store)
    assert manifest_in(backend, NAMESPACE) is not None
    assert store.exists([manifest_key(NAMESPACE.digest)]).mask == [True]
    store.close()


def test_of_very_many_namespaces_the_least_recently_described_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hicache_core.integrations.foreign.store.MAX_DESCRIBED", 2)
    first, second, third = (replace(NAMESPACE, page_size=n) for n in (1, 2, 3))
    backend = memory()
    store = opened(backend, direct=True)
    for namespace in (first, second, first, third):
        store.describe(namespace)
    settled(store)
    assert store.clear("") == 3
    assert store.write(keys_of("a"), pages_of("a")).mask == [True]
    settled(store)
    found = [manifest_in(backend, one) is not None for one in (first, second, third)]
    assert found == [True, False, True]
    store.describe(second)
    settled(store)
    assert manifest_in(backend, second) is not None
    store.close()


def test_fields_of_their_own_are_refused_among_the_details() -> None:
    with pytest.raises(ConfigError, match="may not have engine"):
        replace(NAMESPACE, details={"engine": "another"})
