"""Jobs of one page, and what backends have in common that only see what a worker calls."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend
from hicache_core.types import BackendContext, ExistsJob, ReadJob, WriteJob

CONTEXT = BackendContext(namespace="0" * 16)
NBYTES = 4


def exists(job_id: int) -> ExistsJob:
    return ExistsJob(job_id, [f"e{job_id}"])


def read(job_id: int, nbytes: int = NBYTES) -> ReadJob:
    return ReadJob(job_id, [f"r{job_id}"], [[memoryview(bytearray(nbytes))]], nbytes)


def write(job_id: int, nbytes: int = NBYTES) -> WriteJob:
    return WriteJob(job_id, [f"w{job_id}"], [[memoryview(bytearray(nbytes))]], nbytes)


class BatchesOnly(StorageBackend):
    """A worker calls nothing but batches; each goes through ``_pass``."""

    def __init__(self) -> None:
        super().__init__(BackendConfig(), CONTEXT)

    @abstractmethod
    def _pass(self, keys: Sequence[str]) -> int:
        """How many pages the call is good for."""

    def get(self, key: str) -> Buffer | None:
        raise NotImplementedError

    def exists(self, key: str) -> bool:
        raise NotImplementedError

    def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError

    def batch_exists(self, keys: Sequence[str]) -> int:
        return self._pass(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Sequence[memoryview]]) -> int:
        return self._pass(keys)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Sequence[memoryview]]) -> int:
        return self._pass(keys)
