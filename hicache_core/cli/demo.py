"""Hold a conversation with a real model over all tiers, checked token by token."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from hicache_core.build.settings_check import check_settings
from hicache_core.cli._backend import CONFIG_HELP
from hicache_core.cli._out_file import OutFile
from hicache_core.config.settings import HiCacheConfig
from hicache_core.config.sources import read_inline
from hicache_core.demo.records import DemoSettings, Outcome
from hicache_core.demo.run import run_demo
from hicache_core.demo.table import print_outcome, shown
from hicache_core.errors import ConfigError

_NEEDED = ("torch", "transformers", "gguf")


@click.command("demo")
@click.option("--json", "json_file", type=OutFile(), help="Write turns and summary as JSON here.")
@click.option("--plot", "plot_file", type=OutFile(), help="Draw the time to first token here.")
@click.argument("name", required=False)
@click.option("--backend", help="Name of the backend, in place of the argument NAME.")
@click.option(
    "--config",
    "--backend-config",
    "backend_config",
    default="{}",
    metavar="JSON|@FILE",
    help=CONFIG_HELP,
)
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Store pages in this folder and keep it. Default: a temporary folder.",
)
@click.option(
    "--model",
    help="A local model folder, a GGUF file, or packaged weights: smollm2 (the default) or"
    " gemma3-270m.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(2, 512),
    default=24,
    show_default=True,
    help="Tokens in each answer at most.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of torch. Default: all cores.")
@click.option("--page-size", default="64", show_default=True, help="Tokens in a page.")
@click.option("--hicache-io-backend", help="kernel or direct.")
@click.option("--hicache-mem-layout", help="page_first, page_first_direct or layer_first.")
@click.option("--hicache-write-policy", help="write_through, write_through_selective, write_back.")
@click.option("--corrupt", is_flag=True, help="Overwrite a cached page: the check must fail.")
def command(
    *,
    json_file: Path | None,
    plot_file: Path | None,
    name: str | None,
    backend: str | None,
    backend_config: str,
    keep: Path | None,
    **options: Any,
) -> None:
    """Hold a conversation in two processes and show which tier served each prefix.

    Storage is the backend NAME, or file. Each turn is computed again without a cache. The exit
    status is 1 if a token differs, or if the expected tier did not serve a turn.
    """
    if name and backend:
        raise click.UsageError("with --backend, leave out the argument NAME")
    backend = name or backend or "file"
    plot = _ready_to_draw(plot_file)
    _check_needs()
    with _storage_settings(backend, backend_config, keep) as extra:
        settings = _settings(backend, extra, options)
        console = Console()
        with shown(console) as on_event:
            outcome = run_demo(settings, on_event)
    print_outcome(console, outcome)
    _write(outcome, json_file)
    if plot is not None:
        plot.draw(outcome, plot_file)
    if outcome.problems():
        sys.exit(1)


def _settings(backend: str, extra: dict[str, Any], options: dict[str, Any]) -> DemoSettings:
    """What the processes need; settings are checked here, before a process starts."""
    cache: dict[str, Any] = {
        "hicache_storage_backend": backend,
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config": extra,
    }
    given = {key: options[key] for key in HiCacheConfig.model_fields if key in options}
    cache |= {key: value for key, value in given.items() if value is not None}
    check_settings(HiCacheConfig(**cache))  # before a model is loaded
    return DemoSettings(
        model=options["model"] or "smollm2",
        max_new_tokens=options["max_new_tokens"],
        threads=options["threads"] or len(os.sched_getaffinity(0)),
        cache=cache,
        salt=secrets.token_hex(8),
        corrupt=options["corrupt"],
    )


@contextlib.contextmanager
def _storage_settings(backend: str, given: str, keep: Path | None) -> Iterator[dict[str, Any]]:
    """The backend's settings; for ``file`` without a path, a folder that is removed at the end."""
    extra: dict[str, Any] = read_inline(given, what="--config: ")
    if backend != "file" or "path" in extra:
        if keep is not None:
            raise ConfigError("--keep works only with the file backend, without a path of its own")
        yield extra
    elif keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield {**extra, "path": str(keep)}
    else:
        with tempfile.TemporaryDirectory(prefix="hicache-demo-storage-") as folder:
            yield {**extra, "path": folder}


def _check_needs() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"hicache demo needs {', '.join(missing)}: pip install 'hicache-core[demo]', or run "
            "`make demo` in a clone"
        )


def _ready_to_draw(plot_file: Path | None) -> Any:
    """The drawing module, imported only when asked for: matplotlib is slow and optional."""
    if plot_file is None:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'hicache-core[demo]'")
    return importlib.import_module("hicache_core.demo.plot")


def _write(outcome: Outcome, json_file: Path | None) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(outcome.public(), indent=2) + "\n")
