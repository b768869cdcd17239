"""Speeds from measurements of ``hicache bench`` and ``hicache conformance``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hicache_core.errors import ConfigError
from hicache_core.fleet.setting import Speed, StorageProfile, read_json, read_numbers

_LEAST = 4
"""Fewer requests than this do not tell the parts of a time apart."""

_SLACK_S = 0.001


def read_speed(path: Path) -> Speed:
    """A server's speed, from a result of ``hicache bench --json`` or from a file of its values.

    Raises:
        ConfigError: the file cannot be read, has an unknown value, or a result in it is of requests
            that ran at the same time, or of too few.
    """
    found = read_json(path)
    return fit_speed(path, found["requests"]) if "requests" in found else read_numbers(Speed, path)


def read_storage(path: Path) -> StorageProfile:
    """A backend's speed, from ``hicache conformance --json`` or from a file of its values.

    Raises:
        ConfigError: the file cannot be read, has an unknown value, or lacks a measurement.
    """
    found = read_json(path)
    if "figures" not in found:
        return read_numbers(StorageProfile, path)
    figures = {one["what"]: float(one["value"]) for one in found["figures"]}
    try:
        return _profile(figures)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{path}: the report lacks the measurement {error}; a backend is measured when all its "
            "rules pass"
        ) from error


def fit_speed(where: object, requests: Sequence[Mapping[str, Any]]) -> Speed:
    """The speed that fits the times of requests best, by least squares; no part is negative.

    Args:
        where: begins the message of an error.
        requests: as ``hicache bench --json`` writes them.

    Raises:
        ConfigError: two of them ran at the same time, or there are fewer than four.
    """
    good = [one for one in requests if not one["reply"]["error"] and one["reply"]["ttft_s"]]
    good.sort(key=lambda one: float(one["sent_s"]))
    if len(good) < _LEAST:
        raise ConfigError(f"{where}: {len(good)} requests are too few for a speed; send more")
    for first, second in pairwise(good):
        if second["sent_s"] < first["sent_s"] + first["reply"]["latency_s"] - _SLACK_S:
            raise ConfigError(
                f"{where}: requests ran at the same time, so that their times do not tell a speed; "
                "measure with --max-parallel 1"
            )
    replies = [one["reply"] for one in good]
    computed = [
        (one["prompt_tokens"] - one["cached_tokens"], one["cached_tokens"]) for one in replies
    ]
    request_s, token_s, pair_s = _fit(
        [[1.0, n, n * (past + n / 2)] for n, past in computed],
        [one["ttft_s"] for one in replies],
    )
    long = [one for one in replies if one["output_tokens"] > 1]
    decode_s = context_s = 0.0
    if long:
        decode_s, context_s = _fit(
            [[1.0, one["prompt_tokens"] + one["output_tokens"] / 2] for one in long],
            [(one["latency_s"] - one["ttft_s"]) / (one["output_tokens"] - 1) for one in long],
        )
    return Speed(request_s, token_s, pair_s, decode_s, 0.0, context_s)


def _fit(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """A weight of at least 0 for each column; what would be negative is 0, and the others fit."""
    matrix, wanted = np.array(rows, dtype=float), np.array(values, dtype=float)
    used = list(range(matrix.shape[1]))
    weights = np.zeros(matrix.shape[1])
    while used:
        scale = np.maximum(np.abs(matrix[:, used]).max(axis=0), 1e-30)
        found = np.linalg.lstsq(matrix[:, used] / scale, wanted, rcond=None)[0] / scale
        if (found >= 0).all():
            weights[used] = found
            break
        used.pop(int(found.argmin()))
    return [float(weight) for weight in weights]


def _profile(figures: Mapping[str, float]) -> StorageProfile:
    """A page costs a part for itself and a part for its bytes: two sizes tell them apart."""
    page_s, read_rate = _page_and_rate(figures, "get")
    _, write_rate = _page_and_rate(figures, "set")
    latency_s = max(0.0, figures["get of 4 KiB, median"] / 1e6 - page_s)
    return StorageProfile(
        question_s=figures["exists, median"] / 1e6,
        latency_s=latency_s,
        page_s=page_s,
        read_nbytes_per_s=read_rate,
        write_nbytes_per_s=write_rate,
    )


def _page_and_rate(figures: Mapping[str, float], what: str) -> tuple[float, float]:
    """Seconds for a page besides its bytes, and bytes per second."""
    marks = [
        (int(name.split()[-2]) << 10, rate * 1e6)
        for name, rate in figures.items()
        if name.startswith(f"{what}, batches of ")
    ]
    if not marks:
        raise ValueError(f"{what}, batches of 32")
    (small, slow), (large, fast) = min(marks), max(marks)
    bytes_s = large / fast - small / slow
    if bytes_s <= 0:
        return 0.0, fast
    rate = (large - small) / bytes_s
    return max(0.0, small / slow - small / rate), rate
