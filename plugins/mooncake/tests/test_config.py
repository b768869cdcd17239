"""Settings: keys before environment before defaults; every one of them is in the README."""

from __future__ import annotations

from pathlib import Path

import pytest
from hicache_mooncake import MooncakeBackend, MooncakeConfig, hicache_backends
from hicache_mooncake.config import split_address
from pydantic import ValidationError

from hicache_core.plugin.hookspecs import ENTRY_POINT_GROUP

PLUGIN = Path(__file__).parents[1]


def test_the_environment_gives_what_the_config_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_MASTER", "10.0.0.1:50051")
    monkeypatch.setenv("MOONCAKE_TE_META_DATA_SERVER", "http://10.0.0.1:8080/metadata")
    monkeypatch.setenv("MOONCAKE_GLOBAL_SEGMENT_SIZE", "816043786240")
    monkeypatch.setenv("MOONCAKE_PROTOCOL", "rdma")
    monkeypatch.setenv("MOONCAKE_DEVICE", "mlx5_0,mlx5_1")
    monkeypatch.setenv("MOONCAKE_LOCAL_HOSTNAME", "gpu7")
    config = MooncakeConfig()
    assert config.master_server_address == "10.0.0.1:50051"
    assert config.metadata_server == "http://10.0.0.1:8080/metadata"
    assert config.global_segment_size == 816043786240
    assert config.protocol == "rdma"
    assert config.device_name == "mlx5_0,mlx5_1"
    assert config.local_hostname == "gpu7"


def test_a_config_key_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_MASTER", "10.0.0.1:50051")
    monkeypatch.setenv("MOONCAKE_GLOBAL_SEGMENT_SIZE", "1")
    config = MooncakeConfig.model_validate(
        {"master_server_address": "10.0.0.2:1", "global_segment_size": "4gb"}
    )
    assert config.master_server_address == "10.0.0.2:1"
    assert config.global_segment_size == 4 * 10**9


@pytest.mark.parametrize("address", ["", "host", "host:", ":50051", "host:0", "host:x"])
def test_a_wrong_master_address_is_an_error_that_says_what_to_set(address: str) -> None:
    with pytest.raises(ValidationError, match="MOONCAKE_MASTER to host:port"):
        MooncakeConfig(master_server_address=address)


def test_without_a_master_the_error_says_what_to_set() -> None:
    with pytest.raises(ValidationError, match="MOONCAKE_MASTER to host:port"):
        MooncakeConfig()


def test_a_wrong_size_in_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_GLOBAL_SEGMENT_SIZE", "much")
    with pytest.raises(ValidationError, match="global_segment_size"):
        MooncakeConfig(master_server_address="a:1")


def test_an_unknown_key_is_an_error_that_names_it() -> None:
    with pytest.raises(ValidationError, match="master_adress"):
        MooncakeConfig(master_adress="a:1")  # type: ignore[call-arg]


def test_addresses_are_split_into_host_and_port() -> None:
    assert split_address("master:50051") == ("master", 50051)
    assert split_address("[::1]:50051") == ("::1", 50051)
    assert split_address("etcd://a:1;b:2") is None


def test_every_setting_and_its_variable_is_in_the_readme() -> None:
    readme = (PLUGIN / "README.md").read_text()
    for name, field in MooncakeConfig.model_fields.items():
        assert f"| `{name}` |" in readme
        for word in (field.description or "").replace(";", " ").split():
            if word.startswith("MOONCAKE_"):
                assert f"`{word}`" in readme


def test_the_entry_point_names_the_module_with_the_hook() -> None:
    text = (PLUGIN / "pyproject.toml").read_text()
    assert f'[project.entry-points."{ENTRY_POINT_GROUP}"]\nmooncake = "hicache_mooncake"' in text
    assert hicache_backends() == [MooncakeBackend]
    assert MooncakeBackend.name == "mooncake"
