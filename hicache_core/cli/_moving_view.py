"""What one sees of a move: its progress, and the report at its end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import click
from rich.filesize import decimal
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn

from hicache_core.cli._cache_choice import summary
from hicache_core.cli._columns import columns
from hicache_core.cli._progress import watched
from hicache_core.storage.manifest import Manifest
from hicache_core.storage.moving.outcomes import Outcome, Result, Totals
from hicache_core.storage.moving.prompts import FoundPrompt

_SAID = (Outcome.DAMAGED, Outcome.REFUSED, Outcome.NO_ROOM)
_MAX_SAID = 20
_WORDS = {Outcome.PRESENT: "there already", Outcome.NO_ROOM: "without room"}


class MoveView:
    """Shows a move while it runs, on stderr, and keeps its times.

    The progress is for terminals. The first objects that are not moved are named in any case.
    """

    def __init__(self, what: str, total: int | None) -> None:
        """Shows nothing yet.

        Args:
            what: the command, in a word.
            total: objects in all; None if that is not known.
        """
        self.elapsed_s = 0.0
        self._what = what
        self._total = total
        self._nbytes = 0
        self._n_said = 0
        self._n_moved = 0
        self._began_s = 0.0
        self._progress = watched(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[moved]}"),
            TimeRemainingColumn(),
        )

    def __enter__(self) -> Self:
        self._began_s = time.monotonic()
        self._progress.start()
        self._task = self._progress.add_task(self._what, total=self._total, moved="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.elapsed_s = time.monotonic() - self._began_s
        self._progress.stop()

    def told(self, results: Sequence[Result]) -> None:
        """Takes results, as ``mover.move`` tells them."""
        for result in results:
            if result.outcome is Outcome.COPIED:
                self._nbytes += result.nbytes
                self._n_moved += 1
            if result.outcome in _SAID:
                self._say(result)
        elapsed_s = max(time.monotonic() - self._began_s, 1e-9)
        moved = (
            f"{self._n_moved:,} pages, {decimal(self._nbytes)}, "
            f"{decimal(int(self._nbytes / elapsed_s))}/s, {self._n_moved / elapsed_s:,.0f} pages/s"
        )
        self._progress.update(self._task, advance=len(results), moved=moved)

    def _say(self, result: Result) -> None:
        self._n_said += 1
        if self._n_said <= _MAX_SAID:
            why = f": {result.reason}" if result.reason else ""
            click.echo(f"{result.outcome:9} {result.key}{why}", err=True)
        elif self._n_said == _MAX_SAID + 1:
            click.echo("more of them are counted only", err=True)


def show_report(
    totals: Totals,
    view: MoveView,
    manifests: Mapping[str, Manifest | None],
    found: Sequence[FoundPrompt] = (),
    *,
    as_json: bool,
    err: bool = False,
) -> None:
    """Prints what was moved, and ends the command with its exit status.

    Args:
        totals: of the move.
        view: that showed it.
        manifests: of the namespaces, as far as they are known.
        found: what the source has of each prompt.
        as_json: as JSON instead of text.
        err: print to stderr, since stdout has the archive.
    """
    if as_json:
        click.echo(json.dumps(_as_dict(totals, view, found), indent=2), err=err)
    else:
        click.echo("\n".join(_lines(totals, view, manifests, found)), err=err)
    click.get_current_context().exit(0 if totals.is_whole else 1)


def _as_dict(totals: Totals, view: MoveView, found: Sequence[FoundPrompt]) -> dict[str, object]:
    return {
        "objects": {outcome.value: totals.n(outcome) for outcome in Outcome},
        "nbytes": totals.copied_nbytes,
        "elapsed_s": view.elapsed_s,
        "cut": totals.n_cut,
        "missing": totals.n_missing,
        "gone": totals.n_gone,
        "stopped": totals.stopped,
        "namespaces": totals.by_namespace(),
        "prompts": [{"pages": one.n_pages, "stored": one.n_stored} for one in found],
    }


def _lines(
    totals: Totals,
    view: MoveView,
    manifests: Mapping[str, Manifest | None],
    found: Sequence[FoundPrompt],
) -> Iterator[str]:
    for n, one in enumerate(found, 1):
        yield f"prompt {n}: {one.n_stored:,} of its {one.n_pages:,} pages are stored"
    rows = [
        (namespace, outcome, f"{sums['objects']:,}", f"{sums['nbytes']:,}")
        for namespace, outcomes in totals.by_namespace().items()
        for outcome, sums in outcomes.items()
    ]
    if rows:
        yield columns([("NAMESPACE", "OUTCOME", "OBJECTS", "BYTES"), *rows])
    yield from (summary(one) for one in manifests.values() if one is not None)
    if totals.n_cut or totals.n_missing:
        yield f"{totals.n_cut:,} cut off, {totals.n_missing:,} more never arrived in the archive"
    if totals.n_gone:
        yield (
            f"at least {totals.n_gone:,} of the copied are gone again: the target has a limit and "
            "evicts; raise its limit, or copy less"
        )
    if totals.stopped:
        yield f"stopped: {totals.stopped}"
    counts = [
        f"{totals.n(outcome):,} {_WORDS.get(outcome, outcome.value)}"
        for outcome in Outcome
        if totals.n(outcome) or outcome is Outcome.COPIED
    ]
    elapsed_s = max(view.elapsed_s, 1e-9)
    yield (
        f"{', '.join(counts)}; {decimal(totals.copied_nbytes)} in {elapsed_s:.1f} s "
        f"({decimal(int(totals.copied_nbytes / elapsed_s))}/s, "
        f"{totals.n(Outcome.COPIED) / elapsed_s:,.0f} pages/s)"
    )
