"""Types for the settings of backends: sizes and times."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_nbytes(value: object) -> object:
    """Parses a size: ``"20GB"`` -> 20 * 10**9, ``"512MiB"`` -> 512 * 2**20.

    A value that is not text is returned unchanged.

    Raises:
        ValueError: the text is not a size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(
            f"{value!r} is not a size; write a number of bytes, or for example '20GB' or '512MiB'"
        )
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _UNITS[unit.upper()])


Nbytes = Annotated[int, BeforeValidator(parse_nbytes), Field(gt=0)]
"""A positive number of bytes, or text with a unit: ``20GB`` is decimal, ``20GiB`` binary."""

Seconds = Annotated[float, Field(gt=0)]
"""A positive time in seconds."""

ConnectTimeout = Annotated[Seconds, Field(description="limit for establishing a connection")]
"""The type of ``connect_timeout_s`` in every backend that has it; defaults differ."""

TimeToLive = Annotated[Seconds | None, Field(description="objects expire after this time")]
"""The type of ``ttl_s`` in every backend that has it; None keeps objects forever."""
