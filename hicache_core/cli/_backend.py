"""A storage backend on the command line: ``NAME --config JSON|@file``, alike in every command."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import click

from hicache_core.build.backends import bare_backend, split_settings
from hicache_core.config.settings import ControllerKeys
from hicache_core.config.sources import read_inline
from hicache_core.errors import BackendUnavailable, ConfigError
from hicache_core.storage.base import StorageBackend
from hicache_core.testing.recipe import NAMESPACE, Recipe, Scope
from hicache_core.types import BackendContext

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., None])

CANNOT = 3
"""Exit status of a command whose backend cannot do what was asked."""

CONFIG_HELP = "The backend's settings: JSON text, or @file."


class Cannot(click.ClickException):
    """The backend cannot do what was asked, whatever its store holds."""

    exit_code = CANNOT


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The backend that a command line names. Nothing is opened before one of the methods is called.

    Attributes:
        name: an installed plugin, ``dynamic`` or ``chain``.
        settings: of the backend, as in the extra config of a server.
    """

    name: str
    settings: Mapping[str, object] = field(repr=False)

    @property
    def own_settings(self) -> dict[str, object]:
        """The settings without those of a server's controller: commands accept the same file."""
        own = set(ControllerKeys.model_fields)
        if self.name == "dynamic":
            own.remove("tp_lcm_size")
        return {key: value for key, value in self.settings.items() if key not in own}

    def recipe(self, scope: Scope = Scope.SHARED, max_object_nbytes: int = 0) -> Recipe:
        """A recipe for the conformance kit and its doctor; as ``Recipe.named``.

        Raises:
            PluginError: the backend is not installed or does not load.
            ConfigError: a setting is wrong, or says that the store is only read.
        """
        common, own = split_settings(self.own_settings)
        if common.read_only:
            raise self._only_read()
        return Recipe.named(self.name, own, scope, max_object_nbytes)

    def reading(
        self, context: BackendContext | None = None
    ) -> contextlib.AbstractContextManager[StorageBackend]:
        """The open backend, without seal and guard, for a command that only reads.

        A store that does not exist is not created, and nothing is changed in one that does. The
        backend is closed at the end of the block.

        Args:
            context: what the backend may know; some need the length of an object.

        Raises:
            PluginError: the backend is not installed or does not load.
            ConfigError: a setting is wrong.
            BackendError: there is no store, or it cannot be reached.
        """
        known = context or BackendContext(NAMESPACE)
        return self._opened(replace(known, creates=False, read_only=True))

    def changing(
        self, context: BackendContext | None = None
    ) -> contextlib.AbstractContextManager[StorageBackend]:
        """As ``reading``, for a command that removes or pins objects of an existing store."""
        return self._opened(replace(context or BackendContext(NAMESPACE), creates=False))

    def writing(
        self, context: BackendContext | None = None
    ) -> contextlib.AbstractContextManager[StorageBackend]:
        """As ``reading``, for a command that stores objects: a missing store is created."""
        return self._opened(replace(context or BackendContext(NAMESPACE), creates=True))

    def _only_read(self) -> ConfigError:
        return ConfigError(
            f"backend {self.name!r} is read_only, and the command would change its store; "
            "leave read_only out"
        )

    @contextlib.contextmanager
    def _opened(self, context: BackendContext) -> Iterator[StorageBackend]:
        backend = bare_backend(self.name, self.own_settings, context)
        if backend.in_process:
            raise BackendUnavailable(
                f"backend {self.name!r} keeps its objects in the process that stores them, so "
                "another process finds none"
            )
        if backend.context.read_only and not context.read_only:
            raise self._only_read()
        backend.open()
        try:
            yield backend
        finally:
            backend.close()


def names_backend(
    parameter: str = "backend", option: str = "config", metavar: str = "NAME"
) -> Callable[[F], F]:
    """Gives a command the argument NAME and the option ``--config``.

    The command gets them as one keyword argument, a ``BackendChoice``. A command with two backends
    uses the decorator twice, with other names.

    Args:
        parameter: name of the keyword argument.
        option: name of the option, without its two dashes.
        metavar: what the help calls the argument.
    """

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def called(*args: Any, **options: Any) -> None:
            name, config = options.pop(parameter), options.pop(f"{parameter}_config")
            choice = BackendChoice(name, read_inline(config, what=f"--{option}: "))
            command(*args, **options, **{parameter: choice})

        settings = click.option(
            f"--{option}",
            f"{parameter}_config",
            default="{}",
            metavar="JSON|@FILE",
            help=CONFIG_HELP,
        )
        return cast(F, click.argument(parameter, metavar=metavar)(settings(called)))

    return decorate


def able(backend: StorageBackend, kind: type[C], what: str) -> C:
    """The object that does ``kind`` for a backend.

    Args:
        backend: open.
        kind: ``Listable`` or another protocol of ``storage.base``.
        what: what the command needs it for, such as ``list its keys``.

    Raises:
        Cannot: the backend has no such capability.
    """
    found = backend.capability(kind)
    if found is None:
        raise Cannot(f"backend {backend.name!r} cannot {what} (it is not {kind.__name__})")
    return found
