"""Attach a storage backend to a running server."""

from __future__ import annotations

import click

from hicache_core.cli._ask import operates, tell
from hicache_core.cli._backend import BackendChoice, names_backend
from hicache_core.config.settings import HiCacheConfig
from hicache_core.config.sources import EXTRA

_CALL = "/hicache/storage-backend"


@click.command("attach")
@names_backend()
@operates
@click.option(
    "--hicache-storage-prefetch-policy",
    "prefetch_policy",
    help=HiCacheConfig.model_fields["hicache_storage_prefetch_policy"].description,
)
@click.option(
    "--hicache-write-policy",
    "write_policy",
    help=HiCacheConfig.model_fields["hicache_write_policy"].description,
)
@click.option("--json", "as_json", is_flag=True, help="Print what the server has now, as JSON.")
def command(
    *,
    backend: BackendChoice,
    url: str,
    api_key: str | None,
    prefetch_policy: str | None,
    write_policy: str | None,
    as_json: bool,
) -> None:
    """Attach the backend NAME to the server at URL, in place of the present one.

    The server opens it: paths and addresses are those of its machine. Requests go on meanwhile. The
    exit status is 1 if the server refuses; it keeps what it had.
    """
    policies = {
        "hicache_storage_prefetch_policy": prefetch_policy,
        "hicache_write_policy": write_policy,
    }
    body = {
        "hicache_storage_backend": backend.name,
        EXTRA: dict(backend.settings),
        **{name: value for name, value in policies.items() if value is not None},
    }
    said = tell(url, "PUT", _CALL, key=api_key, body=body)
    click.echo((tell(url, "GET", _CALL, key=api_key) if as_json else said).rstrip())
