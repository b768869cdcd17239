"""Predict hit rates, TTFT and cost of a fleet from a trace."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from hicache_core.bench.lengths import Sharing
from hicache_core.bench.traces import TraceRequest, read_trace, scaled
from hicache_core.cli._cache_view import console
from hicache_core.cli._out_file import OutFile
from hicache_core.cli._simulate_view import table
from hicache_core.config.flags import FiniteRange
from hicache_core.errors import ConfigError
from hicache_core.fleet.setting import Prices, Setting

POSITIVE = click.IntRange(min=1)
ABOVE_0 = FiniteRange(min=0, min_open=True)
FROM_0 = FiniteRange(min=0)
SIZE = click.FloatRange(min=0)
FILE = click.Path(dir_okay=False, path_type=Path)
OUT_FILE = OutFile()
EVICTIONS = ("lru", "lfu", "fifo", "slru", "s3fifo", "arc")
ROUTERS = ("prefix", "load", "round-robin")


def _listed(kind: click.ParamType[Any]) -> dict[str, Any]:
    """What makes an option a list of values with commas between them."""

    def values(ctx: click.Context, param: click.Parameter, text: str) -> list[Any]:
        return [kind.convert(one.strip(), param, ctx) for one in text.split(",")]

    return {"callback": values, "metavar": "LIST"}


LISTS = {
    "servers": "servers",
    "device_size": "device_gb",
    "host_size": "host_gb",
    "storage_size": "storage_gb",
    "router": "router",
    "eviction": "eviction",
}
"""Options that take several values, with the field of a setting that each is."""

_option = functools.partial(click.option, show_default=True)
_FLEET = (
    _option("--servers", **_listed(POSITIVE), default="1", help="Servers."),
    _option("--device-size", **_listed(SIZE), default="40", help="GB of a server's device tier."),
    _option(
        "--host-size", **_listed(SIZE), default="0", help="GB of a server's host tier; 0: none."
    ),
    _option(
        "--storage-size",
        **_listed(SIZE),
        default="0",
        help="GB of the store that all servers share; 0: none, inf: no limit.",
    ),
    _option(
        "--router",
        **_listed(click.Choice(ROUTERS)),
        default="prefix",
        help="How a server is chosen: prefix and load as hicache router does, or round-robin.",
    ),
    _option(
        "--eviction",
        **_listed(click.Choice(EVICTIONS)),
        default="lru",
        help="Eviction policy of device and host.",
    ),
    _option(
        "--write-policy",
        type=click.Choice(["write_through", "write_through_selective", "write_back"]),
        default="write_through",
        help="When pages go down.",
    ),
    _option(
        "--prefetch-policy",
        type=click.Choice(["best_effort", "wait_complete", "timeout"]),
        default="wait_complete",
        help="How long a request waits for storage.",
    ),
    _option(
        "--prefetch-threshold",
        type=click.IntRange(min=0),
        default=256,
        help="Tokens that must be missing before storage is asked.",
    ),
    _option(
        "--prefetch-admission",
        "admission",
        type=click.Choice(["always", "cost_aware"]),
        default="always",
        help="How much of what storage has is loaded.",
    ),
    _option("--page-size", type=POSITIVE, default=64, help="Tokens in a page."),
    _option(
        "--kv-nbytes",
        "token_nbytes",
        type=POSITIVE,
        default=131072,
        help="Bytes of the KV of a token; the default is that of Llama 3 8B in bfloat16.",
    ),
    _option("--layers", type=POSITIVE, default=32, help="Layers of the model."),
    _option("--max-running", type=POSITIVE, default=64, help="Sequences that a server computes."),
    _option("--chunk-tokens", type=POSITIVE, default=2048, help="Tokens of prompts in a step."),
)
_SPEED = (
    click.option(
        "--speed",
        "speed_file",
        type=FILE,
        help="Speed of a server: the JSON of hicache bench with --max-parallel 1, or of values.",
    ),
    click.option(
        "--storage-profile",
        "storage_file",
        type=FILE,
        help="Speed of storage: the JSON of hicache conformance, or of values.",
    ),
    _option(
        "--bus-bandwidth",
        type=ABOVE_0,
        default=25.0,
        help="GB/s between device and host, each way.",
    ),
)
_LOAD = (
    click.option("--limit", type=POSITIVE, help="Only the first N requests.", metavar="N"),
    _option("--time-scale", type=FROM_0, default=1.0, help="Seconds for a second of the trace."),
    click.option(
        "--request-rate", type=ABOVE_0, help="Arrivals a second, instead of the trace's times."
    ),
    click.option("--max-parallel", type=POSITIVE, help="Requests that run at once; else no limit."),
    click.option("--max-output", type=POSITIVE, help="Tokens in an answer at most."),
    click.option("--block-tokens", type=POSITIVE, help="Tokens for a block; shortens all prompts."),
    click.option("--trace-block-tokens", type=POSITIVE, help="Tokens in a block of the trace."),
    click.option("--time-unit", type=click.Choice(["ms", "s"]), help="Unit of its timestamps."),
    _option(
        "--continues",
        type=FiniteRange(0, 1),
        default=0.5,
        help="Of a trace of lengths: share of prompts that continue an earlier one.",
    ),
    _option(
        "--system-prompts", type=POSITIVE, default=8, help="Of a trace of lengths: system prompts."
    ),
    _option(
        "--system-tokens",
        type=click.IntRange(min=0),
        default=512,
        help="Of a trace of lengths: tokens of a system prompt.",
    ),
    _option("--seed", type=int, default=1, help="Seed of all random choices."),
)
_OUT = (
    click.option("--price-server", type=FROM_0, help="Price of a server for an hour."),
    click.option("--price-host", type=FROM_0, help="Price of a GB of host memory for an hour."),
    click.option("--price-storage", type=FROM_0, help="Price of a GB in storage for an hour."),
    click.option("--json", "json_file", type=OUT_FILE, help="Write all results here."),
    click.option(
        "--png", "png_file", type=OUT_FILE, help="Draw the results here (needs matplotlib)."
    ),
    click.option("--jobs", type=POSITIVE, help="Simulations at once; by default one a core."),
)


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    options = reversed((*_FLEET, *_SPEED, *_LOAD, *_OUT))
    return functools.reduce(lambda made, option: option(made), options, function)


@click.command("simulate")
@click.argument("traces", type=FILE, nargs=-1, required=True)
@_with_options
def command(*, traces: tuple[Path, ...], json_file: Path | None, **options: Any) -> None:
    """Serve TRACES on simulated fleets: hit rate by tier, TTFT, bytes moved, cost.

    Servers, sizes, routers and eviction policies may be lists, as in --servers 1,2,4: every
    combination is simulated. The cache is the real one; only time and bytes are not.
    """
    png_file: Path | None = options["png_file"]
    for module, extra in (("torch", "torch"), ("httpx", "bench")):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"hicache simulate needs {module}: pip install 'hicache-core[{extra}]'"
            )
    if png_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--png needs matplotlib: pip install 'hicache-core[bench]'")
    rows = _run(traces, options)
    console(least_width=150).print(table(rows))
    for note in _notes(rows, options):
        click.echo(note)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if png_file is not None:
        importlib.import_module("hicache_core.fleet.plot").draw(rows, png_file)


def _run(traces: Sequence[Path], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of all traces and settings, with the name of the trace as ``trace``."""
    sweep = importlib.import_module("hicache_core.fleet.sweep")  # imports torch, which takes long
    simulation = importlib.import_module("hicache_core.fleet.simulation")
    lists = {name: options[option] for option, name in LISTS.items()}
    settings = sweep.combinations(_base(options), lists)
    requests = [_requests(path, options) for path in traces]
    names = ("time_scale", "request_rate", "max_parallel", "max_output", "seed")
    load = simulation.Load(**{name: options[name] for name in names})
    n_processes = options["jobs"] or len(os.sched_getaffinity(0))
    prices = _prices(options)
    rows = []
    n_all = len(settings) * len(traces)
    with click.progressbar(length=n_all, label="simulating", file=sys.stderr) as bar:
        for n, result in enumerate(sweep.run_all(settings, requests, load, n_processes)):
            rows.append({"trace": traces[n // len(settings)].name} | result.as_json(prices))
            bar.update(1)
    return rows


def _base(options: dict[str, Any]) -> Setting:
    """The setting without the values that are lists."""
    names = {one for one in Setting.__dataclass_fields__ if one in options} - set(LISTS.values())
    given = {name: options[name] for name in names}
    base = Setting(**given, bus_nbytes_per_s=options["bus_bandwidth"] * 1e9)
    speed_file, storage_file = options["speed_file"], options["storage_file"]
    if speed_file or storage_file:
        measured = importlib.import_module("hicache_core.fleet.measured")
        if speed_file:
            base = replace(base, speed=measured.read_speed(speed_file))
        if storage_file:
            base = replace(base, storage=measured.read_storage(storage_file))
    return base


def _requests(path: Path, options: dict[str, Any]) -> list[TraceRequest]:
    sharing = Sharing(
        **{name: options[name] for name in ("continues", "system_prompts", "system_tokens", "seed")}
    )
    found = read_trace(
        path,
        options["limit"],
        block_tokens=options["trace_block_tokens"],
        time_unit=options["time_unit"],
        sharing=sharing,
    )
    return [scaled(one, options["block_tokens"]) for one in found]


def _prices(options: dict[str, Any]) -> Prices | None:
    given = [options[f"price_{what}"] for what in ("server", "host", "storage")]
    return None if all(price is None for price in given) else Prices(*(p or 0.0 for p in given))


def _notes(rows: Sequence[dict[str, Any]], options: dict[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    notes = []
    if options["speed_file"] is None:
        notes.append(
            "The speed of a server is assumed: give --speed, or trust the hit rates and not the "
            "times."
        )
    if any(row["setting"]["storage_gb"] != 0 for row in rows) and options["storage_file"] is None:
        notes.append("The speed of storage is assumed: give --storage-profile.")
    if n_refused := max(row["refused"] for row in rows):
        notes.append(f"Up to {n_refused} requests were refused: a device had no room for them.")
    return notes
