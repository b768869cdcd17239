"""Detach the storage backend of a running server."""

from __future__ import annotations

import click

from hicache_core.cli._ask import operates, tell

_CALL = "/hicache/storage-backend"


@click.command("detach")
@operates
@click.option("--json", "as_json", is_flag=True, help="Print what the server has now, as JSON.")
def command(*, url: str, api_key: str | None, as_json: bool) -> None:
    """Detach the storage backend of the server at URL, which goes on without storage.

    What is being written is finished first; nothing in the store is removed.
    """
    said = tell(url, "DELETE", _CALL, key=api_key)
    click.echo((tell(url, "GET", _CALL, key=api_key) if as_json else said).rstrip())
