"""The secrets among a backend's settings, which must not show anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hicache_core.config.redact import looks_secret

_PASSWORD_IN_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s/@:]*:([^\s'\"]+)@")
_MIN_LENGTH = 4  # a shorter one would be found in unrelated text


def secrets_in(settings: object, key: str = "") -> list[str]:
    """Texts in ``settings`` that are secret: by the name of the key, or as password of a URL."""
    if isinstance(settings, Mapping):
        return [s for name, value in settings.items() for s in secrets_in(value, str(name))]
    if isinstance(settings, (list, tuple)):
        return [s for value in settings for s in secrets_in(value, key)]
    if not isinstance(settings, str):
        return []
    found = [settings] if looks_secret(key) else _PASSWORD_IN_URL.findall(settings)
    return [text for text in found if len(text) >= _MIN_LENGTH]
