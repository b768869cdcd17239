"""The part of the catalogue on KV that moves from prefill to decode nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hicache_core.observe.series import Read, Sample, Series
from hicache_core.observe.snapshot import TransferStatus
from hicache_core.observe.windows import Observation


def _by(get: Callable[[TransferStatus], Mapping[str, int]]) -> Read:
    """Reads a mapping whose keys are the second label."""

    def read(seen: Observation) -> Iterator[Sample]:
        for transfers in seen.snapshot.transfers:
            for word, n in get(transfers).items():
                yield (transfers.backend, word), n

    return read


def _connections(seen: Observation) -> Iterator[Sample]:
    for transfers in seen.snapshot.transfers:
        if transfers.connections is not None:
            yield (transfers.backend,), transfers.connections


_OUTCOMES = ("sent", "arrived", "failed")
BACKEND = {"transfer_backend": "name of the transfer backend"}
DIRECTION = {**BACKEND, "direction": "`sent`, `received`"}

TRANSFERS = (
    Series(
        "transfer_bytes_total",
        "counter",
        "bytes",
        "Bytes of KV moved by transfers that have ended, including failed ones.",
        _by(lambda transfers: transfers.nbytes),
        DIRECTION,
    ),
    Series(
        "transfer_rows_total",
        "counter",
        "rows",
        "Rows moved by transfers that have ended: one token of one layer, all heads of the rank.",
        _by(lambda transfers: transfers.rows),
        DIRECTION,
    ),
    Series(
        "transfers_total",
        "counter",
        "requests",
        "Transfers that have ended, one for each request, by their outcome on this node.",
        _by(lambda transfers: {**dict.fromkeys(_OUTCOMES, 0), **transfers.outcomes}),
        {**BACKEND, "outcome": "`sent`, `arrived`, `failed`"},
    ),
    Series(
        "transfer_seconds",
        "histogram",
        "seconds",
        "Time from offering KV (prefill) or asking for it (decode) to the end of the transfer.",
        lambda seen: [((item.backend,), item.seconds) for item in seen.snapshot.transfers],
        BACKEND,
    ),
    Series(
        "transfers_in_flight",
        "gauge",
        "requests",
        "Requests whose KV is being moved or waited for.",
        _by(lambda transfers: transfers.in_flight),
        DIRECTION,
    ),
    Series(
        "transfer_connections",
        "gauge",
        "connections",
        "Open connections to other nodes.",
        _connections,
        BACKEND,
    ),
)
