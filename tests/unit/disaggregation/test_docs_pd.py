"""docs/pd.md names every setting, flag and path."""

from __future__ import annotations

from pathlib import Path

from hicache_core.cli.router import command
from hicache_core.disaggregation.roles import TIMEOUT_S
from hicache_core.kv_transfer.peers import PeerConfig
from hicache_core.plugin.hookspecs import TRANSFER_GROUP
from hicache_core.router.app import PATHS

PAGE = (Path(__file__).parents[3] / "docs" / "pd.md").read_text(encoding="utf-8")


def test_every_setting_of_a_transfer_backend_is_described() -> None:
    for name in PeerConfig.model_fields:
        assert f"| `{name}` |" in PAGE, name
    assert f"`{TRANSFER_GROUP}`" in PAGE
    assert f"after {TIMEOUT_S:.0f} s" in PAGE


def test_every_path_of_the_router_is_named() -> None:
    for path in PATHS:
        assert f"`{path}`" in PAGE, path


def test_the_flags_of_the_router_that_are_named_exist() -> None:
    flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    for flag in flags - {"--host", "--port", "--by-prefix", "--log-level"}:
        assert flag in flags
        assert flag in PAGE
