"""Load prefixes of prompts from storage into the host tier of a running server."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn

from hicache_core.cli._ask import operates, post
from hicache_core.cli._progress import watched
from hicache_core.cli._prompt import Prompt, given_prompt, prompts_in

WARM = "/hicache/warm"
_BATCH = 8
_TIMEOUT_S = 300.0
"""More than the server waits for its store."""


@click.command("warm")
@operates
@click.option(
    "--prompt", multiple=True, help="A prompt: token ids, a text, or @file. May be repeated."
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file of prompts, one a line, as text or JSON.",
)
@click.option("--extra-key", help="The extra_key of the requests that will come.")
@click.option("--cache-salt", help="The cache_salt of the requests that will come.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    *,
    url: str,
    api_key: str | None,
    prompt: tuple[str, ...],
    prompts: Path | None,
    extra_key: str | None,
    cache_salt: str | None,
    as_json: bool,
) -> None:
    """Load what storage has of prompts into the host tier of the server at URL.

    The server must have a storage backend; it tokenizes texts itself. Without a URL: the server on
    this machine at port 30000. The call is for the operator: it needs the admin key, if the server
    has one. The exit status is 0 if the server now has all whole pages of all prompts, 1 if it has
    not or does not answer, and 2 if the command line is wrong.
    """
    given = [*map(given_prompt, prompt), *(prompts_in(prompts) if prompts else ())]
    if not given:
        raise click.UsageError("there is no prompt: give --prompt or --prompts")
    tenant = {"extra_key": extra_key, "cache_salt": cache_salt}
    began_s = time.monotonic()
    answers = list(_answers(url, api_key, given, tenant))
    elapsed_s = max(time.monotonic() - began_s, 1e-9)
    told = [one for answer in answers for one in answer["prompts"]]
    if as_json:
        click.echo(json.dumps({"elapsed_s": elapsed_s, "prompts": told}, indent=2))
    else:
        click.echo("\n".join(_lines(told, answers[0], elapsed_s)))
    click.get_current_context().exit(1 if any("reason" in one for one in told) else 0)


def _answers(
    url: str, key: str | None, given: Sequence[Prompt], tenant: Mapping[str, str | None]
) -> Iterator[Any]:
    """What the server answers, a few prompts at a time; shows the progress on a terminal."""
    progress = watched(
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts, {task.fields[moved]}"),
    )
    with progress:
        task = progress.add_task("warm", total=len(given), moved="")
        began_s, n_loaded = time.monotonic(), 0
        for batch in _batches(given):
            field = "text" if isinstance(batch[0], str) else "input_ids"
            answer = post(url, WARM, {field: batch, **tenant}, key=key, timeout_s=_TIMEOUT_S)
            n_loaded += sum(one["loaded_tokens"] for one in answer["prompts"])
            moved = _speed(n_loaded, answer, time.monotonic() - began_s)
            progress.update(task, advance=len(batch), moved=moved)
            yield answer


def _batches(given: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Runs of prompts of one form: a body has texts, or token ids."""
    for _, run in itertools.groupby(given, key=lambda prompt: isinstance(prompt, str)):
        while batch := list(itertools.islice(run, _BATCH)):
            yield batch


def _speed(n_tokens: int, sizes: Mapping[str, int], elapsed_s: float) -> str:
    n_pages = n_tokens // sizes["page_size"]
    nbytes = n_pages * sizes["page_nbytes"]
    return (
        f"{n_pages:,} pages, {decimal(nbytes)} from storage "
        f"({decimal(int(nbytes / elapsed_s))}/s, {n_pages / elapsed_s:,.0f} pages/s)"
    )


def _lines(
    told: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], elapsed_s: float
) -> Iterator[str]:
    for n, one in enumerate(told, 1):
        why = f"; {one['reason']} {one['detail']}".rstrip() if "reason" in one else ""
        yield (
            f"prompt {n}: {one['loaded_tokens']:,} of {one['prompt_tokens']:,} tokens came from "
            f"storage, the server has {one['cached_tokens']:,}{why}"
        )
    n_loaded = sum(one["loaded_tokens"] for one in told)
    reasons = Counter(one["reason"] for one in told if "reason" in one)
    short = f"; {reasons.total():,} prompts not complete" if reasons else ""
    yield f"{len(told):,} prompts, {_speed(n_loaded, sizes, elapsed_s)}{short}"
