"""ServerSettings: the checked settings of a server, and notices about those without effect."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from hicache_core.config.hosts import is_loopback
from hicache_core.config.settings import HiCacheConfig
from hicache_core.config.sources import DEFAULT
from hicache_core.engine.config import EngineConfig
from hicache_core.errors import ConfigError
from hicache_core.server.access import Keys

DEFAULTS = EngineConfig()
_IB_DEVICE = re.compile(r"[A-Za-z0-9_.:-]+(,[A-Za-z0-9_.:-]+)*")
HIERARCHICAL = "enable_hierarchical_cache"
RETENTION = "hicache_host_retention"
OFFLOAD_FLAG = "--disaggregation-decode-enable-offload-kvcache"
DEVICES = Path("/sys/class/infiniband")
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")


@dataclass(frozen=True, slots=True)
class Disaggregation:
    """Settings of prefill and decode on different servers.

    Attributes:
        mode: ``null`` for one server that does both, ``prefill`` or ``decode``.
        transfer_backend: how KV goes from one to the other.
        ib_device: names of RDMA devices, separated by commas; empty for none.
        offload: whether a decode server stores what it generates on host and storage.
        bootstrap_port: on which a prefill server offers KV; 0 for any free one.
    """

    mode: str = "null"
    transfer_backend: str = "mooncake"
    ib_device: str = ""
    offload: bool = False
    bootstrap_port: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for settings that contradict each other."""
        if self.ib_device and not _IB_DEVICE.fullmatch(self.ib_device):
            raise ConfigError(
                f"--disaggregation-ib-device {self.ib_device!r} is not a list of device names; "
                "write mlx5_0 or mlx5_0,mlx5_1"
            )
        if self.offload and self.mode != "decode":
            raise ConfigError(
                f"{OFFLOAD_FLAG} is for a decode server; --disaggregation-mode is {self.mode}"
            )


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """All settings of a server.

    Attributes:
        model_path: a folder, a GGUF file, the name of packaged weights, or of a model in a hub's
            cache.
        cache: settings of the cache; ``enable_hierarchical_cache`` has SGLang's default.
        engine: settings of the engine.
        keys: that callers must send.
        host: the address to listen on.
        port: 0 for any free one.
        tp: processes that compute the model together.
        log_level: of the standard library's logging.
        served_model_name: what clients see; empty for the model's own.
        enable_metrics: whether ``/metrics`` answers.
        enable_cache_report: whether usage says what was cached.
        log_requests: whether each request is a line in the log when it ends.
        shutdown_timeout_s: seconds for running requests at the end, and again for backups.
        disaggregation: settings of prefill and decode on different servers.
        max_client_priority: maximum priority of clients without the admin key.
        dtype: of weights and KV: ``auto``, or a name of ``DTYPES``.
        chat_template: file with a Jinja template; empty for the model's own.
        without_effect: flags that were given and have no effect on this server.
    """

    model_path: str
    cache: HiCacheConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    keys: Keys = field(default_factory=Keys)
    host: str = "127.0.0.1"
    port: int = 30000
    tp: int = 1
    log_level: str = "info"
    served_model_name: str = ""
    enable_metrics: bool = False
    enable_cache_report: bool = False
    log_requests: bool = False
    shutdown_timeout_s: float = 20.0
    disaggregation: Disaggregation = field(default_factory=Disaggregation)
    max_client_priority: int = 0
    dtype: str = "auto"
    chat_template: str = ""
    without_effect: tuple[str, ...] = ()


def goes_over_rdma(disaggregation: Disaggregation, devices: Path = DEVICES) -> bool:
    """Whether the named devices exist and the transfer backend can use them."""
    named = disaggregation.ib_device.split(",")
    return disaggregation.transfer_backend == "mooncake" and all(
        (devices / name).exists() for name in named if name
    )


def as_sglang_means(config: HiCacheConfig, *, offload: bool) -> HiCacheConfig:
    """The same configuration with SGLang's defaults for host and storage.

    SGLang's server has only the device tier unless ``--enable-hierarchical-cache`` is given. A
    decode server that offloads has all tiers, and frees host pages once they are stored.

    Args:
        config: from all sources; what somebody set is not changed.
        offload: True for a decode server that offloads.
    """
    if offload:
        meant = {HIERARCHICAL: True, RETENTION: "free_once_stored"}
        source = f"flag {OFFLOAD_FLAG}"
    else:
        meant, source = {HIERARCHICAL: False}, "default of hicache serve"
    unset = {key: value for key, value in meant.items() if config.sources[key] == DEFAULT}
    return config.changed(unset, source) if unset else config


def notices(settings: ServerSettings, device: str) -> Iterator[str]:
    """Yields a line for each setting without effect, and for each risk of the configuration.

    Args:
        settings: as given.
        device: ``cpu`` or ``cuda``.
    """
    # What of the cache is in force otherwise than asked is in the log, said by resolve().
    for flag in settings.without_effect:
        yield f"{flag} is taken for SGLang's sake and changes nothing here"
    if device == "cpu" and settings.engine.mem_fraction_static != DEFAULTS.mem_fraction_static:
        yield (
            f"--mem-fraction-static {settings.engine.mem_fraction_static} has no effect on a CPU; "
            "--max-total-tokens sets the room of the device tier"
        )
    if settings.disaggregation.ib_device and not goes_over_rdma(settings.disaggregation):
        yield (
            f"--disaggregation-ib-device {settings.disaggregation.ib_device} has no effect: KV "
            "goes over TCP"
        )
    is_open = not is_loopback(settings.host)
    if _lacks_secret(settings):
        yield (
            f"{settings.host} can be reached from other machines, and no --disaggregation-secret "
            "is set: this node takes no request of a router and exchanges no KV until router and "
            "nodes are started with the same HICACHE_DISAGGREGATION_SECRET"
        )
    if is_open and settings.keys.api is None:
        yield (
            f"{settings.host} can be reached from other machines, and no --api-key is set: "
            "whoever reaches it may use it"
        )


def with_secret(settings: ServerSettings) -> ServerSettings:
    """The same settings with a random secret, if one is needed and none was given.

    A prefill or decode node that other machines can reach then trusts no peer.
    """
    if not _lacks_secret(settings):
        return settings
    return replace(settings, keys=replace(settings.keys, transfer=secrets.token_hex(32)))


def _lacks_secret(settings: ServerSettings) -> bool:
    is_half = settings.disaggregation.mode != "null"
    return is_half and settings.keys.transfer is None and not is_loopback(settings.host)
