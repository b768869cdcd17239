"""One setting of a fleet: servers and tiers, how fast they are, and what they cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from hicache_core.errors import ConfigError

GB = 1e9
UNLIMITED = math.inf

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Speed:
    """How long a server computes.

    ``n`` tokens of a prompt behind ``past`` others take ``n * token_s + n * (past + n / 2) *
    pair_s``. One more token for each of ``b`` sequences with ``context`` tokens together takes
    ``decode_s + b * sequence_s + context * context_s``. The defaults are assumed, not measured.

    Attributes:
        request_s: seconds for a request, whatever its length: HTTP, tokenizer, first sampling.
        token_s: seconds for a token of a prompt.
        pair_s: seconds for a pair of a token and one before it, in attention.
        decode_s: seconds for a decode step.
        sequence_s: seconds more for each sequence in it.
        context_s: seconds more for each token that its sequences attend to.
    """

    request_s: float = 0.005
    token_s: float = 1e-4
    pair_s: float = 0.0
    decode_s: float = 0.02
    sequence_s: float = 0.0
    context_s: float = 0.0

    def prefill_s(self, n: int, past: int) -> float:
        """Seconds for ``n`` tokens of a prompt behind ``past`` others."""
        return n * self.token_s + n * (past + n / 2) * self.pair_s

    def step_s(self, n_sequences: int, n_context: int) -> float:
        """Seconds for a token of each of some sequences, which have so many tokens together."""
        return self.decode_s + n_sequences * self.sequence_s + n_context * self.context_s


@dataclass(frozen=True, slots=True)
class StorageProfile:
    """How fast a storage backend is, for one server. The defaults are assumed, not measured.

    Attributes:
        question_s: seconds until storage has said which pages it has.
        latency_s: seconds that a read or a write takes besides its pages.
        page_s: seconds for each page besides its bytes.
        read_nbytes_per_s: bytes that a server reads per second.
        write_nbytes_per_s: bytes that a server writes per second.
        shared_nbytes_per_s: bytes per second that all servers read and write together.
    """

    question_s: float = 0.001
    latency_s: float = 0.001
    page_s: float = 0.0
    read_nbytes_per_s: float = 2e9
    write_nbytes_per_s: float = 2e9
    shared_nbytes_per_s: float = UNLIMITED


@dataclass(frozen=True, slots=True)
class Prices:
    """What a fleet costs, in any currency.

    Attributes:
        server_hour: of a server with its device.
        host_gb_hour: of a GB of host memory for the cache.
        storage_gb_hour: of a GB in storage.
    """

    server_hour: float = 0.0
    host_gb_hour: float = 0.0
    storage_gb_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """A fleet: equal servers, each with a device and a host tier, and one store for all.

    Policies have the names that they have in ``HiCacheConfig``.

    Attributes:
        servers: how many.
        device_gb: room of the device tier of each server, in GB.
        host_gb: room of the host tier of each server, in GB; 0 for none.
        storage_gb: room of the store in GB; 0 for none, infinite for no limit.
        router: name of the policy that chooses a server.
        eviction: eviction policy of device and host.
        write_policy: when pages go down.
        prefetch_policy: how long a request waits for storage.
        prefetch_threshold: tokens that must be missing before storage is asked.
        admission: how much of what storage has is loaded.
        page_size: tokens in a page.
        token_nbytes: bytes of the KV of a token.
        layers: of the model; loads of a layer overlap with the computation of others.
        max_running: sequences that a server computes at once.
        chunk_tokens: tokens of prompts that it computes in one step.
        storage_threads: calls of storage that a server makes at once.
        bus_nbytes_per_s: bytes per second between device and host, in each direction.
        speed: how long a server computes.
        storage: how fast storage is.
    """

    servers: int = 1
    device_gb: float = 40.0
    host_gb: float = 0.0
    storage_gb: float = 0.0
    router: str = "prefix"
    eviction: str = "lru"
    write_policy: str = "write_through"
    prefetch_policy: str = "wait_complete"
    prefetch_threshold: int = 256
    admission: str = "always"
    page_size: int = 64
    token_nbytes: int = 131072
    layers: int = 32
    max_running: int = 64
    chunk_tokens: int = 2048
    storage_threads: int = 4
    bus_nbytes_per_s: float = 25e9
    speed: Speed = field(default_factory=Speed)
    storage: StorageProfile = field(default_factory=StorageProfile)

    def __post_init__(self) -> None:
        """Raises ConfigError for a size that cannot be."""
        if self.servers < 1:
            raise ConfigError(f"servers is {self.servers}; a fleet has at least 1")
        for name in ("device_gb", "host_gb", "storage_gb"):
            size_gb, is_memory = getattr(self, name), name != "storage_gb"
            if not size_gb >= 0 or (is_memory and size_gb == UNLIMITED):
                raise ConfigError(f"{name} is {size_gb}; it is a number of GB of at least 0")
        if self.pages(self.device_gb) < 1:
            raise ConfigError(
                f"a device tier of {self.device_gb:g} GB has no room for a page of "
                f"{self.page_nbytes:,} bytes"
            )
        if self.storage_gb and not self.host_gb:
            raise ConfigError("storage needs a host tier: give the host a size")

    @property
    def page_nbytes(self) -> int:
        """Bytes of a page."""
        return self.page_size * self.token_nbytes

    def pages(self, gb: float) -> int:
        """Whole pages in ``gb`` GB."""
        return int(gb * GB // self.page_nbytes)

    def as_json(self) -> dict[str, Any]:
        """All values; null for what has no limit."""
        return _finite(asdict(self))


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found[name] = _finite(value)
        else:
            found[name] = None if value == UNLIMITED else value
    return found


def read_numbers(kind: type[T], path: Path) -> T:
    """A ``Speed`` or a ``StorageProfile`` from a JSON file that names some of its values.

    Raises:
        ConfigError: the file cannot be read, or has an unknown name or no number in it.
    """
    values = read_json(path)
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown value {name!r}; the values are {', '.join(known)}")
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < math.inf
        ):
            raise ConfigError(f"{path}: {name} is {value!r}; it is a number of at least 0")
    return kind(**values)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: it cannot be read, or is not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
