"""A real S3 server on free loopback ports, and backends on it."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from hicache_s3 import S3Backend, S3Config

from hicache_core.types import BackendContext
from plugins.s3.tests.world import NAMESPACE
from tests.servers.weed import Weed, settings


@pytest.fixture(scope="session", autouse=True)
def _models_are_read_once() -> Iterator[None]:
    """boto3 reads botocore's model of S3 anew for each session, 0.1 s; the tests open hundreds."""
    with pytest.MonkeyPatch.context() as patch:
        shared = functools.cache(botocore.session.create_loader)
        patch.setattr(botocore.session, "create_loader", shared)
        yield


@pytest.fixture(autouse=True)
def _no_aws_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """One server for every test that leaves it alone."""
    server = Weed(tmp_path_factory.mktemp("weed"))
    yield server
    server.close()


@pytest.fixture
def own_weed(tmp_path: Path) -> Iterator[Weed]:
    """A server that a test may kill."""
    server = Weed(tmp_path / "weed")
    yield server
    server.close()


MakeBackend = Callable[..., S3Backend]


@pytest.fixture
def make_backend(weed: Weed) -> Iterator[MakeBackend]:
    """Opens backends, each with the prefix of the test, and closes them."""
    backends: list[S3Backend] = []
    prefix = f"t{time.monotonic_ns():x}/"

    def make(
        url: str = "", object_nbytes: int = 0, least_nbytes: int = 0, **options: Any
    ) -> S3Backend:
        config = S3Config(**settings(url or weed.url, **{"prefix": prefix, **options}))
        context = BackendContext(NAMESPACE, object_nbytes, least_nbytes=least_nbytes)
        backends.append(S3Backend(config, context))
        backends[-1].open()
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()
