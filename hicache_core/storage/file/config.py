"""Settings of the file backend."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, model_validator

from hicache_core.storage.base import BackendConfig
from hicache_core.storage.lanes import default_lanes
from hicache_core.storage.settings import Nbytes, Seconds

_DIRECTORY = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"
_OF_SGLANG = {"file_path": "path", "max_size": "max_nbytes"}


class FileConfig(BackendConfig):
    """Settings of the ``file`` backend."""

    path: Path = Field(description="the directory; created if its parent exists")
    max_nbytes: Nbytes | None = Field(
        default=None,
        description="maximum disk space of the objects; the least recently used are evicted; "
        "by default 90 % of the free space at start",
    )
    namespace_quota_nbytes: Nbytes | None = Field(
        default=None,
        description="maximum bytes of the objects in one namespace; its least recently used are "
        "evicted",
    )
    ttl_s: Seconds | None = Field(default=None, description="objects expire after this time")
    fsync: bool = Field(
        default=False, description="write through to the medium: survives a power cut, is slower"
    )
    io_threads: int = Field(
        default_factory=default_lanes,
        ge=1,
        le=64,
        description="threads that share the work of one large call",
    )
    lock_timeout_s: Seconds = Field(
        default=5.0, description="how long to wait for a transaction of another process"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_sglang_says(cls, values: object) -> object:
        """Accepts SGLang's names of these settings, and its variable for the directory."""
        if not isinstance(values, Mapping):
            return values
        taken = dict(values)
        for name, own in _OF_SGLANG.items():
            if name in taken and own not in taken:
                taken[own] = taken.pop(name)
        if "path" not in taken and (directory := os.environ.get(_DIRECTORY)):
            taken["path"] = directory
        return taken
