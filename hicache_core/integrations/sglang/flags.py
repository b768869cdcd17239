"""The flags ``--hicache-core`` and ``--hicache-core-config`` of SGLang, for its group of plugins.

SGLang calls ``install`` in every process it starts, whether or not the flags are used. So nothing
but the standard library is imported here until ``--hicache-core`` is given.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_HOOKED = ("add_cli_args", "from_cli_args")
_CLASS = {
    "backend_name": "hicache",
    "module_path": "hicache_core.integrations.sglang",
    "class_name": "HiCacheBackend",
    "interface_v1": 1,
}
_logger = logging.getLogger(__name__)


def install() -> None:
    """Adds the flags to SGLang's; logs a sentence if this SGLang has no place for them."""
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
        from sglang.srt.server_args import ServerArgs

        missing = [name for name in _HOOKED if not hasattr(ServerArgs, name)]
        if missing:
            raise ImportError(f"ServerArgs has no {', '.join(missing)}")
    except ImportError as error:
        _logger.warning(
            "this SGLang does not take the flag --hicache-core (%s);"
            " use --hicache-storage-backend dynamic, as docs/engines.md shows",
            error,
        )
        return
    HookRegistry.register(f"{_SERVER_ARGS}.add_cli_args", _add_flags, HookType.AFTER)
    HookRegistry.register(f"{_SERVER_ARGS}.from_cli_args", _translate, HookType.BEFORE)


def _add_flags(_result: object, *given: object, **named: object) -> None:
    parsers = [one for one in (*given, *named.values()) if isinstance(one, argparse.ArgumentParser)]
    try:
        for parser in parsers:
            parser.add_argument(
                "--hicache-core",
                metavar="BACKEND",
                help="store HiCache's pages in this backend of hicache-core: file, redis, s3, ...",
            )
            parser.add_argument(
                "--hicache-core-config",
                metavar="JSON",
                help="settings of that backend: JSON or @file (.json, .toml, .yaml)",
            )
    except argparse.ArgumentError as error:
        _logger.warning("SGLang has a flag of this name already: %s", error)


def _translate(*given: object, **named: object) -> None:
    """Has SGLang load our class if ``--hicache-core`` is given; otherwise changes nothing."""
    for one in (*given, *named.values()):
        if isinstance(one, argparse.Namespace) and getattr(one, "hicache_core", None):
            one.hicache_storage_backend_extra_config = extra_config(
                one.hicache_core,
                getattr(one, "hicache_core_config", None),
                storage_backend=getattr(one, "hicache_storage_backend", None),
                extra=getattr(one, "hicache_storage_backend_extra_config", None),
            )
            one.hicache_storage_backend = "dynamic"


def extra_config(
    backend: str, config: str | None, *, storage_backend: str | None, extra: str | None
) -> str:
    """Returns the JSON of ``--hicache-storage-backend-extra-config`` for a backend of ours.

    A configuration given as ``@file`` stays a file's name, so that passwords in it do not get into
    SGLang's log, where all arguments are printed.

    Args:
        backend: of ``--hicache-core``.
        config: of ``--hicache-core-config``.
        storage_backend: of ``--hicache-storage-backend``; must not be given too.
        extra: of ``--hicache-storage-backend-extra-config``; may have SGLang's own keys, such as
            ``prefetch_threshold``.

    Raises:
        ConfigError: the flags do not go together, or a text or file is malformed.
    """
    from hicache_core.config.sources import read_inline
    from hicache_core.errors import ConfigError
    from hicache_core.integrations.sglang.settings import read_settings

    if storage_backend is not None:
        raise ConfigError(
            f"--hicache-core {backend} and --hicache-storage-backend {storage_backend} name two"
            " storage backends; give one of them"
        )
    settings: Mapping[str, object] | str = read_inline(config or {}, what="--hicache-core-config: ")
    if config is not None and config.startswith("@"):
        settings = f"@{Path(config[1:]).expanduser().resolve()}"
    others = read_inline(extra or {}, what="--hicache-storage-backend-extra-config: ")
    ours = {**_CLASS, "backend": backend, "backend_config": settings}
    read_settings(ours)
    return json.dumps({**others, **ours})
