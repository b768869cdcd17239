"""Measure a running server with conversations or a trace: TTFT, throughput, hit tokens."""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import click

from hicache_core.bench.client import PATHS, Client
from hicache_core.bench.multiturn import MultiTurn, run_multiturn
from hicache_core.bench.prompts import Words, words_of_file
from hicache_core.bench.replay import Replay, run_replay
from hicache_core.bench.result import Record, as_json, summary
from hicache_core.bench.traces import read_trace
from hicache_core.cli._ask import with_scheme
from hicache_core.cli._bench_view import results
from hicache_core.cli._cache_view import console
from hicache_core.cli._out_file import OutFile
from hicache_core.config.flags import FiniteRange
from hicache_core.errors import ConfigError

Run = Callable[[Client, Callable[[Record], None]], Awaitable[list[Record]]]

POSITIVE = click.IntRange(min=1)
FILE = click.Path(dir_okay=False, path_type=Path)
OUT_FILE = OutFile()


@click.group("bench")
def command() -> None:
    """Measure a running server: time to first token, throughput, hit tokens by tier."""


def _for_all(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that every kind of load has."""
    options = (
        click.option(
            "--url",
            default="http://127.0.0.1:30000",
            show_default=True,
            callback=lambda _ctx, _parameter, url: with_scheme(url),
            help="Address of the server.",
        ),
        click.option(
            "--api",
            type=click.Choice(list(PATHS)),
            default="completions",
            show_default=True,
            help="Which API of the server to call.",
        ),
        click.option(
            "--model", default="default", show_default=True, help="Model name in the requests."
        ),
        click.option("--api-key", envvar="HICACHE_API_KEY", help="API key of the server."),
        click.option(
            "--timeout",
            "timeout_s",
            type=float,
            default=600.0,
            show_default=True,
            help="Seconds that a request may take.",
        ),
        click.option(
            "--flush-cache", is_flag=True, help="Empty the server's cache before the run."
        ),
        click.option(
            "--json", "json_file", type=OUT_FILE, help="Write all requests and the summary here."
        ),
        click.option(
            "--png", "png_file", type=OUT_FILE, help="Draw the results here (needs matplotlib)."
        ),
        click.option("--tag", default="", help="Name of this run, for the JSON file and picture."),
    )
    return functools.reduce(lambda made, option: option(made), reversed(options), function)


@command.command("multiturn")
@_for_all
@click.option(
    "--num-clients",
    type=POSITIVE,
    default=8,
    show_default=True,
    help="Number of clients, each with a conversation of its own.",
)
@click.option(
    "--max-parallel",
    type=POSITIVE,
    default=8,
    show_default=True,
    help="Requests that may run at the same time.",
)
@click.option(
    "--request-length",
    type=POSITIVE,
    default=512,
    show_default=True,
    help="Words in the first question of a conversation.",
)
@click.option(
    "--sub-question-input-length",
    type=int,
    default=0,
    help="Words in each later question; 0 for as many as in the first.",
)
@click.option(
    "--output-length",
    type=POSITIVE,
    default=64,
    show_default=True,
    help="Tokens in each answer.",
)
@click.option(
    "--num-rounds",
    type=POSITIVE,
    default=5,
    show_default=True,
    help="Questions in each conversation.",
)
@click.option(
    "--request-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=float("inf"),
    show_default=True,
    help="Requests sent per second.",
)
@click.option(
    "--distribution",
    type=click.Choice(["poisson", "uniform"]),
    default="poisson",
    show_default=True,
    help="How the times between two requests are distributed.",
)
@click.option(
    "--ready-queue-policy",
    type=click.Choice(["random", "fifo"]),
    default="random",
    show_default=True,
    help="Which of the waiting requests is sent next.",
)
@click.option(
    "--shared-prefix-share",
    type=FiniteRange(0, 1),
    default=0.0,
    show_default=True,
    help="Part of the first question that all clients share.",
)
@click.option("--dataset-path", type=FILE, help="Take the words from this text or ShareGPT JSON.")
@click.option(
    "--disable-random-sample", is_flag=True, help="Use random words even if a dataset is given."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of all random choices.")
def multiturn(*, dataset_path: Path | None, disable_random_sample: bool, **options: Any) -> None:
    """Run conversations: each request is the whole history so far and a new question.

    Options that SGLang's bench_multiturn has too have the same names here.
    """
    rest, load_options = _split(options, MultiTurn.__dataclass_fields__)
    load = MultiTurn(**load_options)
    is_sampled = dataset_path is not None and not disable_random_sample
    words = Words(words_of_file(dataset_path) if is_sampled and dataset_path else None)

    def run(client: Client, on_record: Callable[[Record], None]) -> Awaitable[list[Record]]:
        return run_multiturn(load, client, words, on_record=on_record)

    _measure(run, "multiturn", load.num_clients * load.num_rounds, rest)


@command.command("replay")
@click.argument("trace", type=FILE)
@_for_all
@click.option(
    "--trace-block-tokens",
    type=POSITIVE,
    help="Tokens in a block of the trace. Default: by its format (Mooncake 512, Bailian 16).",
)
@click.option(
    "--time-unit",
    type=click.Choice(["ms", "s"]),
    help="Unit of its timestamps. Default: by its format (Mooncake ms, the others s).",
)
@click.option(
    "--block-tokens",
    type=POSITIVE,
    help="Words sent for a block; a smaller number shortens all prompts. Default: its tokens.",
)
@click.option(
    "--time-scale",
    type=FiniteRange(min=0),
    default=1.0,
    show_default=True,
    help="Seconds that a second of the trace takes; 0 sends requests as fast as possible.",
)
@click.option(
    "--max-parallel",
    type=POSITIVE,
    default=64,
    show_default=True,
    help="Requests that may run at the same time.",
)
@click.option(
    "--max-output",
    type=POSITIVE,
    default=1024,
    show_default=True,
    help="Tokens in an answer at most.",
)
@click.option("--limit", type=POSITIVE, help="Send only the first N requests.", metavar="N")
def replay(
    *,
    trace: Path,
    limit: int | None,
    trace_block_tokens: int | None,
    time_unit: Literal["ms", "s"] | None,
    **options: Any,
) -> None:
    """Replay a trace: of Mooncake, Bailian (Qwen), kv-cache-tester, ShareGPT, Azure, BurstGPT.

    Datasets and detailed results of the benchmarks of SGLang and vLLM are read, too.
    """
    rest, replay_options = _split(options, Replay.__dataclass_fields__)
    requests = read_trace(trace, limit, block_tokens=trace_block_tokens, time_unit=time_unit)

    def run(client: Client, on_record: Callable[[Record], None]) -> Awaitable[list[Record]]:
        return run_replay(Replay(**replay_options), requests, client, on_record=on_record)

    _measure(run, f"replay of {trace.name}", len(requests), rest)


def _split(options: dict[str, Any], names: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The common options, and those of this load, which are the fields named by ``names``."""
    own = {name: options.pop(name) for name in list(options) if name in names}
    return options, own


def _measure(run: Run, title: str, n_requests: int, options: dict[str, Any]) -> None:
    """Runs a load, then prints, writes and draws its results."""
    png_file: Path | None = options["png_file"]
    if png_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--png needs matplotlib: pip install 'hicache-core[bench]'")
    title = f"{title} {options['tag']}".rstrip()
    with click.progressbar(length=n_requests, label=title) as bar:
        records, figures = asyncio.run(_run(run, options, lambda _: bar.update(1)))
    console().print(results(title, figures))
    if options["json_file"] is not None:
        found = {
            "title": title,
            "tag": options["tag"],
            "summary": figures,
            "requests": [as_json(record) for record in records],
        }
        options["json_file"].write_text(json.dumps(found, indent=1), encoding="utf-8")
    if png_file is not None:
        importlib.import_module("hicache_core.bench.plot").draw(title, records, figures, png_file)
    if figures["failed"]:
        raise click.ClickException(
            f"{figures['failed']} of {figures['requests']} requests failed: {figures['errors'][0]}"
        )


async def _run(
    run: Run, options: dict[str, Any], on_record: Callable[[Record], None]
) -> tuple[list[Record], dict[str, Any]]:
    client = Client(
        options["url"],
        api=options["api"],
        model=options["model"],
        api_key=options["api_key"],
        timeout_s=options["timeout_s"],
    )
    async with client:
        if options["flush_cache"] and not await client.flush_cache():
            raise click.ClickException(f"{options['url']} did not flush its cache")
        before = await client.figures()
        began = time.perf_counter()
        records = await run(client, on_record)
        elapsed_s = time.perf_counter() - began
        return records, summary(records, elapsed_s, before, await client.figures())
