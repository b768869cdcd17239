"""Types that the settings of backends are made of."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_nbytes(value: object) -> object:
    """``"20GB"`` -> 20 * 10**9, ``"512MiB"`` -> 512 * 2**20; what is no text is passed through.

    Raises:
        ValueError: the text is no size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is no size; write bytes as a number, or like '20GB', '512MiB'")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _UNITS[unit.upper()])


Nbytes = Annotated[int, BeforeValidator(parse_nbytes), Field(gt=0)]
"""A number of bytes, also as text with a unit: ``20GB`` is decimal, ``20GiB`` binary."""

Seconds = Annotated[float, Field(gt=0)]
"""A span of time in seconds."""

ConnectTimeout = Annotated[Seconds, Field(description="limit for establishing a connection")]
"""What ``connect_timeout_s`` is in every backend that has it; the default is the backend's own."""

TimeToLive = Annotated[
    Seconds | None, Field(description="objects are gone so long after they were written")
]
"""What ``ttl_s`` is in every backend that has it: None keeps objects for ever."""
