"""HiCacheConfig: every setting of the cache, read once, checked at the edge, frozen."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)
from pydantic.config import JsonDict

from hicache_core.config.messages import config_error
from hicache_core.config.redact import masked
from hicache_core.config.sources import (
    ARGUMENT,
    CONFIG_FILE,
    DEFAULT,
    EXTRA,
    Layered,
    env_name,
    flag_name,
    read_environ,
    read_file,
    read_inline,
)
from hicache_core.errors import ConfigError
from hicache_core.process.logs import log_once

_RULE = "compatibility rule"
_logger = logging.getLogger(__name__)

EvictionPolicy = Literal["lru", "lfu", "fifo", "slru", "priority", "s3fifo", "arc"]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number, got a boolean")
    return value


def _setting(default: Any, description: str, allowed: str = "", **limits: Any) -> Any:
    """A field of a settings model.

    Args:
        default: the default value; it is validated too.
        description: the help text, which docs/configuration.md repeats.
        allowed: in words, the values that ``limits`` and the type allow.
        limits: pydantic's constraints, such as ``ge=1``.
    """
    extra: JsonDict | None = {"allowed": allowed} if allowed else None
    return Field(
        default, description=description, json_schema_extra=extra, validate_default=True, **limits
    )


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class ControllerKeys(BaseModel):
    """The keys of the extra config that belong to the controller, with SGLang's defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefetch_threshold: Int = _setting(
        256,
        "Storage is asked only if at least this many tokens of a prompt are missing, and read only"
        " if it has at least this many of them.",
        "an integer of at least 0 (tokens)",
        ge=0,
    )
    prefetch_timeout_base: Float = _setting(
        1.0,
        "With the prefetch policy `timeout`: seconds that each prefetch may take.",
        "a number of at least 0 (seconds)",
        ge=0,
    )
    prefetch_timeout_per_ki_token: Float = _setting(
        0.25,
        "With the prefetch policy `timeout`: additional seconds for each 1,024 tokens.",
        "a number of at least 0 (seconds)",
        ge=0,
    )
    hicache_storage_pass_prefix_keys: bool = _setting(
        False,
        "Accepted for compatibility with SGLang, without effect: the key of a page covers its"
        " whole prefix.",
    )
    tp_lcm_size: Int | None = _setting(
        None,
        "Given to a class written for SGLang, which `dynamic` loads; no other backend gets it.",
        "an integer of at least 1, or null",
        ge=1,
    )


class HiCacheConfig(BaseModel):
    """Every setting of the cache. Frozen; an unknown name or a bad value is a ``ConfigError``.

    Build it from arguments, ``HiCacheConfig(page_size=16)``, or from all sources with ``load``.
    It holds the values *asked for*; ``resolve`` returns those *in force*.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    page_size: Int = _setting(
        64, "Tokens in a page, the unit of caching.", "an integer from 1 to 65536", ge=1, le=65536
    )
    enable_hierarchical_cache: bool = _setting(
        True, "Use host memory and storage; if false, the device tier is the only one."
    )
    hicache_ratio: Float = _setting(
        2.0,
        "Size of the host pool as a multiple of the device pool; if 0, `hicache_size` sets it.",
        "a number from 0 to 1000000",
        ge=0,
        le=1e6,
    )
    hicache_size: Float = _setting(
        0.0,
        "Size of the host pool in GB (10^9 bytes); overrides `hicache_ratio` unless it is 0.",
        "a number from 0 to 1000000 (GB)",
        ge=0,
        le=1e6,
    )
    hicache_io_backend: Literal["kernel", "direct"] = _setting(
        "kernel",
        "How pages are copied between device and host: `kernel` copies them in one fused launch,"
        " `direct` makes one copy for each page and layer.",
    )
    hicache_write_policy: Literal["write_through", "write_through_selective", "write_back"] = (
        _setting(
            "write_through",
            "When a page is copied to the host: `write_through` at once, `write_through_selective`"
            " at its second use, `write_back` when the device evicts it.",
        )
    )
    hicache_mem_layout: Literal["page_first", "page_first_direct", "layer_first"] = _setting(
        "page_first", "Layout of the host pool: the order of the bytes of a page."
    )
    hicache_storage_backend: str | None = _setting(
        None,
        "Name of the storage backend: an installed plugin, `file`, `memory`, or `dynamic` for a"
        " class that the extra config names; `none` for no storage.",
        "a name of lower-case letters, digits, - and _, or none",
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
    )
    hicache_storage_prefetch_policy: Literal["best_effort", "wait_complete", "timeout"] = _setting(
        "best_effort",
        "`best_effort` never waits for a prefetch, `wait_complete` waits until it ends, `timeout`"
        " waits for a limited time.",
    )
    prefetch_admission: Literal["always", "cost_aware"] = _setting(
        "always",
        "`always` loads everything that storage has; `cost_aware` loads only what is expected to"
        " give the first token sooner than computing it.",
    )
    storage_head_group: Int | None = _setting(
        None,
        "Number of KV heads in one stored object, so that servers with different tensor-parallel"
        " sizes share pages; none for all heads of a rank.",
        "an integer of at least 1 that divides the heads of every rank, or none",
        ge=1,
    )
    hicache_storage_backend_extra_config: dict[str, Any] = _setting(
        {},
        "Settings of the storage backend, and the controller's keys: a mapping, JSON text, or"
        " `@file` (JSON, TOML, YAML).",
        "a mapping, JSON text of an object, or @file",
    )
    radix_eviction_policy: EvictionPolicy = _setting("lru", "Which pages the device evicts first.")
    hicache_host_eviction_policy: EvictionPolicy = _setting(
        "lru", "Which pages the host evicts first."
    )
    hicache_host_retention: Literal["keep", "free_once_stored"] = _setting(
        "keep",
        "What the host does with pages that are stored: `keep` keeps them until it needs the room,"
        " `free_once_stored` frees them at once.",
    )
    state_snapshot_interval: Int = _setting(
        1024,
        "For models with recurrent state: a prefill keeps a snapshot every so many tokens, rounded"
        " up to whole pages, besides those at the end of a prompt and of an answer.",
        "an integer of at least 1 (tokens)",
        ge=1,
    )
    hicache_explain: bool = _setting(
        True, "Record for each request why tokens were missed (`cache.explain`)."
    )
    hicache_tracing: bool = _setting(
        False, "Emit OpenTelemetry spans for prefetch, load_back and backup."
    )
    hicache_status_port: Int | None = _setting(
        None,
        "Port of the status server (metrics, status, explanations); each rank adds its number. 0"
        " for any free port, none for no server.",
        "an integer from 0 to 65535, or none",
        ge=0,
        le=65535,
    )
    hicache_status_host: str = _setting(
        "127.0.0.1", "Address that the status server listens on; it has no authentication."
    )
    metrics_prefix: str = _setting(
        "hicache:", "Prefix of the name of every metric; `sglang:` for SGLang's dashboards."
    )
    kv_events_config: dict[str, Any] = _setting(
        {},
        "Publish KV events over ZMQ: the fields of `EventsConfig`, as a mapping or JSON text; empty"
        " for no events.",
        "a mapping, or JSON text of an object",
    )
    hicache_storage_threads: Int = _setting(
        4,
        "Number of threads that call the storage backend.",
        "an integer from 1 to 256",
        ge=1,
        le=256,
    )
    hicache_storage_max_read_nbytes: Int = _setting(
        1 << 30,
        "Maximum bytes of storage reads, queued and running; further prefetches are skipped.",
        "an integer of at least 1 (bytes)",
        ge=1,
    )
    hicache_storage_max_write_nbytes: Int = _setting(
        1 << 30,
        "Maximum bytes of storage writes, queued and running; further writes are dropped.",
        "an integer of at least 1 (bytes)",
        ge=1,
    )

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    if not TYPE_CHECKING:  # a type checker keeps the signature that lists the fields

        def __init__(self, **values):
            self._fill(values, {})

    @classmethod
    def load(
        cls,
        *,
        arguments: Mapping[str, object] | None = None,
        flags: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
        file: str | PathLike[str] | None = None,
    ) -> HiCacheConfig:
        """The configuration from all sources: arguments > flags > environment > file > defaults.

        A stronger value replaces a weaker one as a whole; the extra config is not merged.
        ``sources`` tells which source won.

        Args:
            arguments: settings by name; None is a value here.
            flags: settings by name, from a command line; None means that the flag was not given.
            environ: ``os.environ`` or the like (``HICACHE_PAGE_SIZE``); None reads no environment.
            file: a .json, .toml, .yaml or .yml file; an ``@file`` in it is relative to it. None
                for the file that ``HICACHE_CONFIG`` names in ``environ``, if any.

        Raises:
            ConfigError: a name or a value is wrong, or a file cannot be read.
        """
        layered = Layered()
        what = "configuration file"
        if file is None and environ is not None and environ.get(CONFIG_FILE):
            file, what = environ[CONFIG_FILE], f"{CONFIG_FILE}: {what}"
        if file is not None:
            settings = read_file(file, what)
            if EXTRA in settings:
                directory = Path(file).expanduser().parent
                settings[EXTRA] = read_inline(settings[EXTRA], directory, what=f"{EXTRA} ")
            layered.add(settings, lambda _: f"file {file}")
        if environ is not None:
            layered.add(
                read_environ(cls.model_fields, environ), lambda key: f"environment {env_name(key)}"
            )
        if flags is not None:
            given = {key: value for key, value in flags.items() if value is not None}
            layered.add(given, lambda key: f"flag {flag_name(key)}")
        layered.add(arguments or {}, lambda _: ARGUMENT)
        config = cls.__new__(cls)
        config._fill(layered.values, layered.sources)
        return config

    def changed(self, values: Mapping[str, object], source: str) -> HiCacheConfig:
        """A copy with ``values`` in it; every other setting keeps its value and its source.

        Args:
            values: settings by name.
            source: where they come from, in words.

        Raises:
            ConfigError: a name or a value is wrong.
        """
        sources = {key: known for key, known in self.sources.items() if known != DEFAULT}
        layered = Layered({key: getattr(self, key) for key in sources}, sources)
        layered.add(values, lambda _: source)
        config = type(self).__new__(type(self))
        config._fill(layered.values, layered.sources)
        return config

    def _fill(self, values: Mapping[str, object], sources: Mapping[str, str]) -> None:
        """Validates ``values`` into this new instance."""
        try:
            type(self).__pydantic_validator__.validate_python(values, self_instance=self)
        except ValidationError as error:
            raise config_error(error, type(self), sources) from None
        if self.hicache_size == 0 and self.hicache_ratio == 0:
            raise ConfigError(
                "hicache_ratio = 0 and hicache_size = 0: one of them must be greater than 0"
                " (without a host tier, set enable_hierarchical_cache to false)"
            )
        try:
            _ = self.controller_keys
        except ValidationError as error:
            raise config_error(error, ControllerKeys, sources, f"{EXTRA}.") from None
        self._sources.update(sources)

    @field_validator(
        "hicache_storage_backend", "storage_head_group", "hicache_status_port", mode="before"
    )
    @classmethod
    def _none_by_name(cls, value: object) -> object:
        return None if isinstance(value, str) and value.strip().lower() in ("", "none") else value

    @field_validator(EXTRA, "kv_events_config", mode="before")
    @classmethod
    def _read_extra_config(cls, value: object) -> object:
        return copy.deepcopy(read_inline(value))

    @property
    def sources(self) -> Mapping[str, str]:
        """For each setting, where its value came from, in words; equality ignores it."""
        given = {key: ARGUMENT for key in self.model_fields_set}
        names = type(self).model_fields
        return MappingProxyType(dict.fromkeys(names, DEFAULT) | given | self._sources)

    @property
    def controller_keys(self) -> ControllerKeys:
        """The controller's keys of the extra config, validated, with their defaults."""
        extra = self.hicache_storage_backend_extra_config
        own = ControllerKeys.model_fields
        return ControllerKeys(**{key: value for key, value in extra.items() if key in own})

    @property
    def backend_config(self) -> dict[str, object]:
        """A copy of the extra config without the controller's keys: for the backend's Config."""
        extra = self.hicache_storage_backend_extra_config
        own = set(ControllerKeys.model_fields)
        if self.hicache_storage_backend == "dynamic":
            own.remove("tp_lcm_size")
        return copy.deepcopy({key: value for key, value in extra.items() if key not in own})

    def resolve(self) -> ResolvedConfig:
        """Applies the compatibility rules and logs each change once."""
        adjustments = tuple(_apply_rules(self.model_dump()))
        in_force = self.changed({change.key: change.in_force for change in adjustments}, _RULE)
        resolved = ResolvedConfig(asked=self, in_force=in_force, adjustments=adjustments)
        for change in adjustments:
            level = logging.WARNING if change in resolved.refused else logging.DEBUG
            log_once(_logger, level, str(change))
        return resolved

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HiCacheConfig) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]  # the extra config is a dict

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for key, value in self:
            yield key, masked(value)

    __str__ = BaseModel.__repr__


@dataclass(frozen=True, slots=True)
class Adjustment:
    """One setting whose value in force differs from the value asked for.

    Attributes:
        key: its name.
        asked: the value asked for.
        in_force: the value that is used.
        reason: the rule, in words.
    """

    key: str
    asked: object
    in_force: object
    reason: str

    def __str__(self) -> str:
        asked, in_force = _as_written(self.asked), _as_written(self.in_force)
        return f"{self.key}: asked for {asked}, using {in_force}: {self.reason}"


def _as_written(value: object) -> str:
    """A value as it is written in a configuration: ``none``, ``true``, ``64``."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """A configuration as it was asked for, and after the compatibility rules.

    Attributes:
        asked: what the user set.
        in_force: what the cache uses; resolving it again changes nothing.
        adjustments: the differences, with their reasons.
    """

    asked: HiCacheConfig
    in_force: HiCacheConfig
    adjustments: tuple[Adjustment, ...]

    @property
    def refused(self) -> tuple[Adjustment, ...]:
        """The adjustments of values that somebody set; those of defaults are left out."""
        sources = self.asked.sources
        return tuple(change for change in self.adjustments if sources[change.key] != DEFAULT)


def _apply_rules(values: dict[str, Any]) -> Iterator[Adjustment]:
    """Changes ``values`` by the rules, one after the other, and yields each change."""

    def switch(key: str, value: object, reason: str) -> Adjustment:
        asked, values[key] = values[key], value
        return Adjustment(key, asked, value, reason)

    layout, io_backend = values["hicache_mem_layout"], values["hicache_io_backend"]
    if layout == "page_first" and io_backend == "direct":
        yield switch("hicache_mem_layout", "layer_first", "page_first works with kernel only")
    if layout == "page_first_direct" and io_backend == "kernel":
        yield switch("hicache_io_backend", "direct", "page_first_direct works with direct only")
    if values["hicache_size"] > 0 and values["hicache_ratio"] > 0:
        yield switch("hicache_ratio", 0.0, "hicache_size overrides the ratio")
    if not values["enable_hierarchical_cache"] and values["hicache_storage_backend"] is not None:
        yield switch(
            "hicache_storage_backend", None, "storage needs enable_hierarchical_cache: true"
        )
