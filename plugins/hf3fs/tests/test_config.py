"""Settings, their sources, and the tables of the README."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hicache_hf3fs import Hf3fsConfig, hicache_backends
from hicache_hf3fs.config import ENVIRONMENT
from pydantic import ValidationError

from plugins.hf3fs.tests.helpers import new_backend

README = Path(__file__).parents[1] / "README.md"


def from_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    """Has the environment name a file with this text."""
    path = tmp_path / "hf3fs.json"
    path.write_text(text)
    monkeypatch.setenv(ENVIRONMENT, str(path))


def test_the_file_that_sglang_reads_gives_what_is_not_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values: dict[str, Any] = {
        "file_path_prefix": "/data/hicache",
        "file_size": 1 << 40,
        "numjobs": 16,
        "entries": 8,
        "metadata_server_url": "http://10.0.0.1:18000",
        "client_timeout": 5,
    }
    from_file(monkeypatch, tmp_path, json.dumps(values))
    with caplog.at_level(logging.WARNING):
        config = Hf3fsConfig.model_validate({"numjobs": 2})
    assert config.file_path_prefix == Path("/data/hicache")
    assert (config.file_size, config.numjobs, config.entries) == (1 << 40, 2, 8)
    assert "metadata_server_url and client_timeout" in caplog.text


@pytest.mark.parametrize("text", ["[]", "{", '{"file_sise": 1}'])
def test_a_file_that_makes_no_sense_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    from_file(monkeypatch, tmp_path, text)
    with pytest.raises(ValidationError, match=r"hf3fs\.json"):
        Hf3fsConfig.model_validate({"file_path_prefix": "/data/kv"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"file_sise": 1},
        {"file_size": 0},
        {"mode": "usrbo"},
        {"numjobs": 0},
        {"lease_s": 0},
        {"metadata_url": "http://host"},
        {"metadata_url": "host:6379"},
    ],
)
def test_a_wrong_setting_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Hf3fsConfig.model_validate({"file_path_prefix": "/data/kv", **wrong})


def test_the_prefix_has_to_be_given() -> None:
    with pytest.raises(ValidationError, match="file_path_prefix"):
        Hf3fsConfig.model_validate({})


def test_the_password_of_the_metadata_store_is_never_shown(tmp_path: Path) -> None:
    backend = new_backend(tmp_path / "kv", metadata_url="redis://:hunter2@127.0.0.1:1/0")
    assert "hunter2" not in repr(backend.config) + str(backend.config)
    with pytest.raises(OSError, match="127") as caught:
        backend.open()
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValidationError) as wrong:
        Hf3fsConfig.model_validate(
            {"file_path_prefix": "/x", "metadata_url": "reddis://:hunter2@h"}
        )
    assert "hunter2" not in str(wrong.value)


def test_sizes_may_have_units() -> None:
    config = Hf3fsConfig.model_validate({"file_path_prefix": "/data/kv", "file_size": "2TiB"})
    assert config.file_size == 2 << 40


def test_the_readme_names_every_setting_with_its_default_and_no_other() -> None:
    table = README.read_text().partition("## Options")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
    assert list(rows) == list(Hf3fsConfig.model_fields)
    for name, field in Hf3fsConfig.model_fields.items():
        if field.default_factory is None and isinstance(field.default, (int, float, str)):
            config = Hf3fsConfig.model_validate(
                {"file_path_prefix": "/x", name: rows[name].strip(" `")}
            )
            assert getattr(config, name) == field.default, name


def test_the_plugin_offers_its_backend() -> None:
    (backend,) = hicache_backends()
    assert (backend.name, backend.Config) == ("hf3fs", Hf3fsConfig)
