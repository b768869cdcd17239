"""Settings of the ``hf3fs`` backend: config keys first, then the JSON file that SGLang reads."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, SecretStr, model_validator

from hicache_core.plugin.backends import Nbytes, Seconds, TimeToLive, default_lanes, log_once
from hicache_core.storage.base import BackendConfig

logger = logging.getLogger(__name__)

ENVIRONMENT = "SGLANG_HICACHE_HF3FS_CONFIG_PATH"
SCHEMES = ("sqlite", "redis", "rediss", "unix")
_SHARED_KEYS = ("file_path_prefix", "file_size", "numjobs", "entries")
_SGLANG_KEYS = ("metadata_server_url", "client_timeout")  # of a server that is SGLang's own


def _checked_url(url: SecretStr | None) -> SecretStr | None:
    if url is not None:
        scheme, separator, _ = url.get_secret_value().partition("://")
        if not separator or scheme not in SCHEMES:
            raise ValueError(
                "metadata_url is not the URL of a metadata store; write sqlite:///DIR/FILE, "
                "redis://HOST:PORT/DB, rediss://… or unix:///SOCKET"
            )
    return url


def _from_file(path: Path) -> dict[str, Any]:
    """Reads SGLang's file; logs its keys that have no meaning here."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise ValueError(f"{ENVIRONMENT} names {path}, which cannot be read: {exc}") from exc
    if not isinstance(values, dict):
        raise ValueError(f"{ENVIRONMENT} names {path}, which does not contain a JSON object")
    unknown = values.keys() - {*_SHARED_KEYS, *_SGLANG_KEYS}
    if unknown:
        known = ", ".join(_SHARED_KEYS)
        raise ValueError(f"{path} has unknown keys {sorted(unknown)}; known are {known}")
    ignored = [key for key in _SGLANG_KEYS if key in values]
    if ignored:
        log_once(
            logger,
            logging.WARNING,
            f"{path}: {' and '.join(ignored)} belong to SGLang's metadata server, not used here; "
            "set metadata_url to a Redis that all hosts share",
        )
    return {key: values[key] for key in _SHARED_KEYS if key in values}


class Hf3fsConfig(BackendConfig):
    """Settings of the ``hf3fs`` backend.

    If ``file_path_prefix``, ``file_size``, ``numjobs`` or ``entries`` is not set, it is read from
    the JSON file named by ``SGLANG_HICACHE_HF3FS_CONFIG_PATH``, if that variable is set.
    """

    # A message of pydantic would otherwise quote metadata_url, and with it a password.
    model_config = ConfigDict(hide_input_in_errors=True)

    file_path_prefix: Path = Field(
        description="slab files are `<prefix>.r<rank>.<slot size>.slab`; the directory must exist"
    )
    file_size: Nbytes = Field(
        default=16 << 30, description="length of each rank's slab file, allocated at open"
    )
    slot_nbytes: Nbytes | None = Field(
        default=None,
        description="largest object that fits into a slot; by default the object size of the "
        "cache, or 4 MiB if that is not fixed",
    )
    mode: Literal["auto", "usrbio", "posix"] = Field(
        default="auto",
        description="`usrbio` needs `hf3fs_fuse.io` and a 3FS mount; `posix` runs on any file "
        "system; `auto` takes usrbio where it can",
    )
    numjobs: int = Field(
        default_factory=default_lanes,
        ge=1,
        le=256,
        description="usrbio: pairs of rings, one call uses one; posix: threads that share a call",
    )
    entries: int = Field(
        default=8, ge=1, le=4096, description="usrbio: reads or writes in flight in one ring"
    )
    iovec_nbytes: Nbytes = Field(
        default=64 << 20, description="usrbio: shared memory of each pair of rings"
    )
    io_timeout_s: Seconds = Field(
        default=5.0, description="usrbio: limit for the next completion, and for a free ring"
    )
    metadata_url: Annotated[SecretStr | None, AfterValidator(_checked_url)] = Field(
        default=None,
        description="where slots are bound to keys: `sqlite:///DIR/FILE` for the processes of one "
        "host, `redis://…` for many hosts; without it SQLite at `<prefix>.index.sqlite`. It is "
        "never shown, since it may hold a password",
    )
    metadata_timeout_s: Seconds = Field(
        default=2.0, description="limit for one answer of the metadata store"
    )
    lease_s: Seconds = Field(
        default=5.0,
        description="how long a slot is not reused after it was looked up; a read that takes "
        "longer is a miss",
    )
    write_lease_s: Seconds = Field(
        default=60.0,
        description="a slot that was reserved but never published is free again after this time",
    )
    ttl_s: TimeToLive = Field(
        default=None,
        description="objects expire after this time; set the same value everywhere",
    )
    namespace_quota_nbytes: Nbytes | None = Field(
        default=None,
        description="maximum bytes of one namespace, for all ranks together; its least recently "
        "used objects are evicted",
    )
    fsync: bool = Field(
        default=False, description="write through to the medium: survives a power cut, is slower"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_file(cls, values: Any) -> Any:
        path = os.environ.get(ENVIRONMENT)
        if path and isinstance(values, dict):
            return {**_from_file(Path(path)), **values}
        return values
