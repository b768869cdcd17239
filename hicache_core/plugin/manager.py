"""Discovery of plugins: entry points of the groups ``hicache.backends`` and
``hicache.transfer_backends``, read by pluggy.

The core's own (``memory``, ``file``; ``tcp``) are found the same way; there is no other registry.
Called at start-up only, from the owner's thread.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Generic, Literal, TypeVar

import pluggy
from pydantic import BaseModel, ValidationError

from hicache_core.config.messages import config_error
from hicache_core.config.sources import nearest
from hicache_core.errors import BrokenBackend, IncompatibleBackend, UnknownBackend
from hicache_core.kv_transfer.base import API_VERSION as TRANSFER_API_VERSION
from hicache_core.kv_transfer.base import KvTransferBackend, TransferConfig
from hicache_core.plugin import hookspecs
from hicache_core.plugin.hookspecs import ENTRY_POINT_GROUP, PROJECT, TRANSFER_GROUP
from hicache_core.storage.base import API_VERSION, BackendConfig, StorageBackend

Status = Literal["installed", "ok", "broken"]
KindName = Literal["storage", "transfer"]

Plugin = TypeVar("Plugin", StorageBackend, KvTransferBackend)

OUR_PLUGINS = ("hf3fs", "mooncake", "redis", "s3")
"""Backends that this project publishes, each as the distribution ``hicache-NAME``."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kind(Generic[Plugin]):
    """One kind of plugin.

    Attributes:
        group: of its entry points.
        hook: the hook that returns its classes.
        base: what they are subclasses of.
        api_version: the version of that contract.
        noun: what messages call it.
        name: what lists call it.
    """

    group: str
    hook: str
    base: type[Plugin]
    api_version: int
    noun: str
    name: KindName


_STORAGE = _Kind(
    ENTRY_POINT_GROUP,
    "hicache_backends",
    StorageBackend,
    API_VERSION,
    "backend",
    "storage",
)
_TRANSFER = _Kind(
    TRANSFER_GROUP,
    "hicache_transfer_backends",
    KvTransferBackend,
    TRANSFER_API_VERSION,
    "transfer backend",
    "transfer",
)


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """One installed backend, as its distribution's metadata describe it.

    Attributes:
        name: the name that configurations use.
        distribution: the distribution that offers it; empty if its metadata have no name.
        version: that distribution's version.
        module: the module that its entry point names.
        status: ``installed`` if its metadata are in order and it was not loaded; ``ok`` if it was
            loaded (``plugin.check``); ``broken``, with ``error``, if it cannot be used.
        error: why it is broken; empty otherwise.
        kind: ``storage`` or ``transfer``.
    """

    name: str
    distribution: str
    version: str
    module: str
    status: Status
    error: str = ""
    kind: KindName = "storage"


def list_backends() -> list[BackendInfo]:
    """Every installed backend, by name, from metadata alone: no plugin is imported.

    A backend is ``broken`` if two distributions offer its name or its module is missing. All others
    are ``installed``; no code of a plugin is run.
    """
    return _list(_STORAGE)


def list_transfer_backends() -> list[BackendInfo]:
    """Every installed transfer backend, as ``list_backends`` does it."""
    return _list(_TRANSFER)


def _list(kind: _Kind[Plugin]) -> list[BackendInfo]:
    found = _entry_points(kind.group)
    names = [point.name for point in found]
    infos = []
    for point in found:
        error = ""
        if names.count(point.name) > 1:
            error = _conflict(kind.noun, point.name, found)
        elif not module_is_there(_module(point)):
            error = f"module {_module(point)!r} is missing; reinstall {_origin(point)}"
        status: Status = "broken" if error else "installed"
        name, version = _distribution(point)
        info = BackendInfo(point.name, name, version, _module(point), status, error, kind.name)
        infos.append(info)
    return infos


def backend_class(name: str) -> type[StorageBackend]:
    """The class of the installed backend ``name``; only its own plugin is imported.

    Raises:
        UnknownBackend: no distribution offers it; the message lists the installed backends.
        BrokenBackend: its module does not load or has no hook, two distributions offer the name,
            or none of its classes has it.
        IncompatibleBackend: the hook returns something other than a backend of this api_version.
    """
    return _class(_STORAGE, name)


def transfer_backend_class(name: str) -> type[KvTransferBackend]:
    """The class of the installed transfer backend ``name``; raises as ``backend_class`` does."""
    return _class(_TRANSFER, name)


def _class(kind: _Kind[Plugin], name: str) -> type[Plugin]:
    found = _entry_points(kind.group)
    offers = [point for point in found if point.name == name]
    if not offers:
        raise UnknownBackend(_unknown(kind.noun, name, [point.name for point in found]))
    if len(offers) > 1:
        raise BrokenBackend(_conflict(kind.noun, name, found))
    offer = f"{kind.noun} {name!r} of {_origin(offers[0])}"
    classes = _load(kind, name, offers[0], offer)
    for cls in classes:
        _check_class(kind, cls, offer)
        if cls.name == name:
            return cls
    names = ", ".join(repr(cls.name) for cls in classes) or "none"
    raise BrokenBackend(
        f"{offer}: the entry point is named {name!r}, but the classes that module"
        f" {offers[0].module!r} offers are named: {names}; both names must be equal"
    )


def check_backend_class(cls: object, offer: str) -> None:
    """Checks that ``cls`` can be used as a backend.

    Args:
        cls: what a plugin or a setting offers.
        offer: in words, where it comes from; the message begins with it.

    Raises:
        IncompatibleBackend: it is not a class, not a ``StorageBackend``, abstract, of another
            api_version, or its ``name`` or ``Config`` is missing; the message says which.
    """
    _check_class(_STORAGE, cls, offer)


def _check_class(kind: _Kind[Plugin], cls: object, offer: str) -> None:
    if not isinstance(cls, type) or not issubclass(cls, kind.base):
        base = f"{kind.base.__module__}.{kind.base.__qualname__}"
        what = cls.__name__ if isinstance(cls, type) else repr(cls)
        raise IncompatibleBackend(f"{offer}: {what} is not a subclass of {base}")
    if not isinstance(cls.api_version, int):
        raise IncompatibleBackend(f"{offer}: api_version {cls.api_version!r} is not an integer")
    if cls.api_version != kind.api_version:
        older = "the plugin" if cls.api_version < kind.api_version else "hicache-core"
        raise IncompatibleBackend(
            f"{offer} has api_version {cls.api_version}, but this hicache-core has"
            f" {kind.api_version}; upgrade {older}"
        )
    missing = sorted(cls.__abstractmethods__)
    if missing:
        raise IncompatibleBackend(
            f"{offer}: {cls.__name__} does not implement {', '.join(missing)}"
        )
    if not isinstance(getattr(cls, "name", None), str):
        raise IncompatibleBackend(f"{offer}: {cls.__name__} has no class attribute name")
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, BaseModel)):
        raise IncompatibleBackend(f"{offer}: {cls.__name__}.Config is not a pydantic model")


def backend_settings(cls: type[StorageBackend], settings: Mapping[str, object]) -> BackendConfig:
    """``settings`` as the backend's own ``Config``.

    Raises:
        ConfigError: a key is unknown or missing, or a value is wrong; secrets are masked.
    """
    try:
        return cls.Config(**settings)
    except ValidationError as error:
        raise config_error(error, cls.Config, prefix=f"{cls.name}.") from None


def transfer_settings(
    cls: type[KvTransferBackend], settings: Mapping[str, object]
) -> TransferConfig:
    """``settings`` as the transfer backend's own ``Config``; raises ConfigError likewise."""
    try:
        return cls.Config(**settings)
    except ValidationError as error:
        raise config_error(error, cls.Config, prefix=f"{cls.name}.") from None


def module_is_there(module: str) -> bool:
    """Whether ``module`` exists; unlike ``importlib.util.find_spec``, imports no package."""
    if module in sys.modules:
        return True
    path: Sequence[str] | None = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = next(_specs(name, path), None) if part.isidentifier() else None
        if spec is None:
            return False
        path = spec.submodule_search_locations or []
    return True


def _entry_points(group: str) -> list[EntryPoint]:
    """The entry points of a group; a distribution that is found twice counts once.

    Read distribution by distribution, since one whose metadata cannot be read must not hide the
    others, and pip leaves a directory ``~name`` behind when it is killed, with entry points in it.
    """
    points: dict[str, list[EntryPoint]] = {}
    for distribution in distributions():
        if _is_left_behind(distribution):
            continue
        try:
            own = list(distribution.entry_points.select(group=group))
            if not own:  # its metadata is not read: that takes a millisecond for each of hundreds
                continue
            name = str(distribution.metadata.json.get("name", "")) or str(distribution)
        except Exception as error:  # what a stranger's files hold may fail in any way: skipped
            log.warning(
                "cannot read the entry points of %s, reinstall it: %s: %s",
                _directory(distribution) or "a distribution",
                type(error).__name__,
                error,
            )
            continue
        points.setdefault(re.sub(r"[-_.]+", "-", name).lower(), own)
    found = [point for own in points.values() for point in own]
    return sorted(found, key=lambda point: (point.name, _origin(point)))


def _directory(distribution: Distribution) -> str:
    """The name of its metadata directory; empty where it is none of the standard kind."""
    return getattr(getattr(distribution, "_path", None), "name", "")


def _is_left_behind(distribution: Distribution) -> bool:
    """Whether it is what a killed pip moved aside: ``~icache_redis-0.1.0.dist-info``."""
    return _directory(distribution).startswith("~")


def _load(kind: _Kind[Plugin], name: str, point: EntryPoint, offer: str) -> Sequence[type[Plugin]]:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(point.load(), name=name)
        answers = getattr(manager.hook, kind.hook)()
    except (Exception, SystemExit) as error:  # a stranger's code may raise anything: translated
        raise BrokenBackend(
            f"{offer} does not load: {type(error).__name__}: {error} (module {_module(point)!r})"
        ) from error
    if not answers:
        raise BrokenBackend(f"{offer}: module {_module(point)!r} has no hookimpl {kind.hook}()")
    classes: Sequence[type[Plugin]] = answers[0]
    if not isinstance(classes, (list, tuple)):
        raise BrokenBackend(f"{offer}: {kind.hook}() must return a list, not {classes!r}")
    return classes


def _unknown(noun: str, name: str, names: Sequence[str]) -> str:
    found = ", ".join(dict.fromkeys(names)) or "none, not even those of hicache-core; reinstall it"
    close = nearest(name, dict.fromkeys([*names, *OUR_PLUGINS]))
    known = [o for o in OUR_PLUGINS if o not in names and (o == name or repr(o) in close)]
    install = f" ({known[0]} comes with: pip install hicache-{known[0]})" if known else ""
    close = "" if name in OUR_PLUGINS else close
    return f"no {noun} named {name!r} is installed; found: {found}{close}{install}"


def _conflict(noun: str, name: str, found: Sequence[EntryPoint]) -> str:
    origins = " and one from ".join(_origin(point) for point in found if point.name == name)
    return f"two {noun}s are named {name!r}: one from {origins}; uninstall one of them"


def _origin(point: EntryPoint) -> str:
    name, version = _distribution(point)
    return f"{name or 'an unknown distribution'} {version}".strip()


def _distribution(point: EntryPoint) -> tuple[str, str]:
    """Name and version; empty where broken metadata have none."""
    if point.dist is None:
        return "", ""
    fields = point.dist.metadata.json
    return str(fields.get("name", "")), str(fields.get("version", ""))


def _module(point: EntryPoint) -> str:
    """As ``point.module``, but without raising where the value is malformed."""
    return re.split(r"[:\[]", point.value)[0].strip()


def _specs(name: str, path: Sequence[str] | None) -> Iterator[ModuleSpec]:
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except KeyError:  # a namespace package looks for its parent among imported modules
            spec = PathFinder.find_spec(name.rpartition(".")[2], path)
        if spec is not None:
            yield spec
