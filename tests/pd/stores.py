"""The stores of the scene: each a real server or directory, with what a backend must know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.servers.mooncake import running_mooncake
from tests.servers.valkey import Valkey, running
from tests.servers.weed import BUCKET, KEY, SECRET, Weed

LENT_NBYTES = 1 << 30


@contextmanager
def store(name: str, directory: Path) -> Iterator[tuple[dict[str, Any], Valkey | None]]:
    """Starts the store ``name``.

    Yields:
        Its settings, for ``--hicache-storage-backend-extra-config``, and for Valkey the server,
        which can be frozen.
    """
    if name == "redis":
        with running() as server:
            yield {"url": server.url}, server
    elif name == "s3":
        with closing(Weed(directory / "weed")) as weed:
            yield (
                {
                    "endpoint_url": weed.url,
                    "bucket": BUCKET,
                    "access_key_id": KEY,
                    "secret_access_key": SECRET,
                },
                None,
            )
    elif name == "mooncake":
        with running_mooncake(directory, LENT_NBYTES) as master:
            yield {"master_server_address": master.address, "global_segment_size": 0}, None
    elif name == "hf3fs":
        slabs = {"file_path_prefix": str(directory / "kv"), "file_size": 256 << 20, "mode": "posix"}
        yield slabs, None
    else:
        assert name == "file", f"no store {name!r} here"
        yield {"path": str(directory / "kv")}, None
