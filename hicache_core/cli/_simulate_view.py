"""The view of ``hicache simulate``: a table with a row for each setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from hicache_core.fleet.setting import GB

_TITLES = {
    "trace": "TRACE",
    "servers": "SERVERS",
    "device_gb": "DEVICE GB",
    "host_gb": "HOST GB",
    "storage_gb": "STORAGE GB",
    "router": "ROUTER",
    "eviction": "EVICTION",
}
_RESULTS = (
    "HIT %",
    "DEVICE %",
    "HOST %",
    "STORAGE %",
    "TTFT P50",
    "P90",
    "P99",
    "DOWN GB",
    "UP GB",
)
_ALWAYS = ("servers", "device_gb", "host_gb", "storage_gb")


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table; of the other settings it shows those that differ between rows.

    Args:
        rows: results as ``Result.as_json`` has them, with the name of the trace as ``trace``.
    """
    columns = [name for name in _TITLES if name in _ALWAYS or _differs(rows, name)]
    with_cost = "cost" in rows[0]
    found = Table(box=box.SIMPLE, pad_edge=False)
    titles = [*(_TITLES[name] for name in columns), *_RESULTS, *(["COST"] if with_cost else [])]
    for title in titles:
        is_text = title in ("TRACE", "ROUTER", "EVICTION")
        found.add_column(title, justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        cells = [_cell(_value(row, name)) for name in columns]
        found.add_row(*cells, *_results(row), *([f"{row['cost']:,.2f}"] if with_cost else []))
    return found


def _results(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"{100 * row['hit_rate']:.2f}"
    for tier in ("device", "host", "storage"):
        yield f"{100 * row['hit_rates'][tier]:.2f}"
    for share in ("p50", "p90", "p99"):
        value = row["ttft_s"][share]
        yield "–" if value is None else f"{value:.3f} s"
    moved = row["moved_nbytes"]
    for ways in (("device_to_host", "host_to_storage"), ("host_to_device", "storage_to_host")):
        yield f"{sum(moved[way] for way in ways) / GB:,.1f}"


def _differs(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return len({_value(row, name) for row in rows}) > 1


def _value(row: Mapping[str, Any], name: str) -> Any:
    return row["trace"] if name == "trace" else row["setting"][name]


def _cell(value: Any) -> str:
    if value is None:
        return "no limit"
    return f"{value:g}" if isinstance(value, float) else str(value)
