"""Transfer backends are found as storage backends are: by entry point, each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hicache_core.errors import BrokenBackend, ConfigError, IncompatibleBackend, UnknownBackend
from hicache_core.kv_transfer.tcp import TcpTransfer
from hicache_core.plugin.check import check_backends
from hicache_core.plugin.manager import (
    list_transfer_backends,
    transfer_backend_class,
    transfer_settings,
)

GOOD = """
    from hicache_core.kv_transfer.tcp import TcpTransfer
    from hicache_core.plugin import hookimpl

    class Pigeon(TcpTransfer):
        name = "pigeon"

    @hookimpl
    def hicache_transfer_backends():
        return [Pigeon]
"""


def add(site, distribution: str, name: str, module: str, source: str) -> None:
    """A distribution with one transfer backend."""
    site.add(distribution, {}, **{module: source})
    info = next(site.directory.glob(f"{distribution.replace('-', '_')}-*.dist-info"))
    (info / "entry_points.txt").write_text(f"[hicache.transfer_backends]\n{name} = {module}\n")


def test_a_third_party_backend_is_found_and_loaded_by_name(site) -> None:
    add(site, "hicache-pigeon", "pigeon", "pigeon_transfer", GOOD)
    cls = transfer_backend_class("pigeon")
    assert issubclass(cls, TcpTransfer)
    (info,) = [info for info in list_transfer_backends() if info.name == "pigeon"]
    assert (info.distribution, info.status) == ("hicache-pigeon", "installed")
    assert check_backends([info]) == [replace(info, status="ok")]


def test_one_that_does_not_load_is_listed_as_broken(site) -> None:
    add(site, "hicache-bad", "bad", "bad_transfer", "raise OSError('no device')")
    (info,) = [info for info in list_transfer_backends() if info.name == "bad"]
    (checked,) = check_backends([info])
    assert checked.status == "broken"
    assert "no device" in checked.error


def test_an_unknown_name_lists_what_is_there(site) -> None:
    add(site, "hicache-pigeon", "pigeon", "pigeon_transfer", GOOD)
    with pytest.raises(UnknownBackend, match=r"no transfer backend named 'pigeons'.*pigeon"):
        transfer_backend_class("pigeons")


def test_a_module_without_the_hook_is_broken(site) -> None:
    add(site, "hicache-nothing", "nothing", "nothing_transfer", "")
    with pytest.raises(BrokenBackend, match=r"no hookimpl hicache_transfer_backends\(\)"):
        transfer_backend_class("nothing")


def test_a_storage_backend_is_no_transfer_backend(site) -> None:
    source = GOOD.replace("[Pigeon]", "[int]")
    add(site, "hicache-int", "int", "int_transfer", source)
    with pytest.raises(IncompatibleBackend, match=r"int is not a subclass of .*KvTransferBackend"):
        transfer_backend_class("int")


def test_settings_are_the_backends_own() -> None:
    assert transfer_settings(TcpTransfer, {"port": 5}).model_dump()["port"] == 5
    with pytest.raises(ConfigError, match=r"tcp\.prot"):
        transfer_settings(TcpTransfer, {"prot": 5})
