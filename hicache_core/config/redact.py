"""Masking of secrets in whatever is shown: errors, logs, ``repr`` and reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

MASK = "***"

_SECRET = frozenset(
    """
    password passwd pass pwd pw passphrase requirepass masterauth
    secret secrets token credential credentials auth
    authorization signature sas apikey accesskey api_key access_key private_key account_key
    secret_key encryption_key customer_key connection_string connectionstring
    """.split()  # noqa: SIM905 - a list of this length reads better as text
)
# Names that only look secret: counts of tokens, in the sense of a language model.
_HARMLESS = frozenset(["prefetch_timeout_per_ki_token"])
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Up to the last @: a password with an unescaped / or @ must not show its tail.
_USERINFO = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"]*@")
# ``host=db password='a b'``, as libpq and its like take it in one text.
_PAIR = re.compile(r"(\b([A-Za-z0-9_.-]+)\s*=\s*)('(?:[^'\\]|\\.)*'|\"[^\"]*\"|[^\s&;'\"]+)")
_QUERY = re.compile(r"([?&;]([A-Za-z0-9_.-]+)=)[^&;\s'\"]*")


def looks_secret(key: str) -> bool:
    """Whether a setting of this name should never be shown."""
    if key in _HARMLESS:
        return False
    words = re.split(r"[^a-z0-9]+", _CAMEL.sub("_", key).lower())
    pairs = (f"{first}_{second}" for first, second in pairwise(words))
    return not _SECRET.isdisjoint(words) or not _SECRET.isdisjoint(pairs)


def masked_text(text: str) -> str:
    """``text`` without the userinfo of its URLs and the secrets in its ``name=value`` pairs."""

    def pair(match: re.Match[str]) -> str:
        return match[1] + MASK if looks_secret(match[2]) else match[0]

    return _PAIR.sub(pair, _QUERY.sub(pair, _USERINFO.sub(rf"\1{MASK}@", text)))


def masked(value: object, key: str = "") -> object:
    """A copy of ``value`` that may be shown: secrets are masked, at any depth.

    Args:
        value: the value of ``key``; mappings and lists are walked.
        key: its name; a name that looks secret masks the whole value, unless it is empty.
    """
    if key and looks_secret(key) and value not in (None, "", b""):
        return MASK
    if isinstance(value, Mapping):
        return {name: masked(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [masked(item) for item in value]
    if isinstance(value, (bytes, bytearray)):
        return masked_text(value.decode("utf-8", "replace"))
    return masked_text(value) if isinstance(value, str) else value
