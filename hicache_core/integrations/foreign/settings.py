"""What the settings of all adapters have in common."""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias

from pydantic import BeforeValidator

from hicache_core.config.sources import read_inline


def _mapping_or_text(value: object) -> object:
    return read_inline(value) if isinstance(value, str) else value


BackendSettings: TypeAlias = Annotated[dict[str, object], BeforeValidator(_mapping_or_text)]
"""A backend's own settings: a mapping, JSON text, or ``@file``, which keeps passwords out of the
engine's arguments and log."""


def release_of(version: str) -> tuple[int, ...]:
    """Returns the three numbers of an engine's version; empty if it does not begin with them.

    Args:
        version: such as ``0.5.23``, ``0.5.23.post1`` or ``0.5.7rc2``.
    """
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()
