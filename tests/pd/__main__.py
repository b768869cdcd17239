"""The scene of prefill and decode on different nodes, on one machine: ``python -m tests.pd``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hicache_core.server.run import load_model
from hicache_core.types import CachedTokens
from tests.pd.cluster import Cluster
from tests.pd.reference import plain_answer
from tests.pd.scene import Shape, Turn, check_hits, play
from tests.pd.stores import store
from tests.unit.engine.tiny_chat_model import save_tiny_chat_model

PAGE_SIZE = 16
PAUSE_S = 10.0
STORES = ("redis", "file", "hf3fs", "s3", "mooncake")
FAULTS = ("none", "kill", "pause")


def main(arguments: Sequence[str] | None = None) -> int:
    """Plays the scene as the command line says; 0 if every token and hit was as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.pd", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or a folder")
    parser.add_argument("--store", choices=STORES, action="append", help="default: redis")
    parser.add_argument("--fault", choices=FAULTS, action="append", help="default: none")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--transfer", default="tcp", help="transfer backend: tcp or mooncake")
    parser.add_argument(
        "--tp",
        type=int,
        nargs=2,
        default=(1, 1),
        metavar=("PREFILL", "DECODE"),
        help="ranks of each prefill node and of the decode node; pages are stored head by head",
    )
    given = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    n_wrong = 0
    with tempfile.TemporaryDirectory(prefix="hicache-pd-") as directory:
        model = given.model
        if model == "tiny":
            model = str(save_tiny_chat_model(Path(directory) / "tiny"))
        vocabulary = load_model(model, "cpu").model.config.vocab_size
        shape = Shape(vocabulary, PAGE_SIZE, n_turns=given.turns)
        for name in given.store or ["redis"]:
            for fault in given.fault or ["none"]:
                place = Path(directory) / f"{name}-{fault}"
                place.mkdir()
                scene = Scene(console, model, shape, given.transfer, given.tp)
                n_wrong += scene.run(name, fault, place)
    return 1 if n_wrong else 0


class Scene:
    """One run on one store with one fault."""

    def __init__(
        self, console: Console, model: str, shape: Shape, transfer: str, tp: Sequence[int]
    ) -> None:
        """Starts nothing yet; ``tp`` says how many ranks prefill and decode nodes have."""
        self._console = console
        self._model = model
        self._shape = shape
        self._transfer = transfer
        self._tp = tp

    def run(self, name: str, fault: str, directory: Path) -> int:
        """Plays it and prints what happened; how many things were wrong."""
        say = self._console.print
        n_prefill, n_decode = self._tp
        say(
            f"[bold]2 prefill nodes (--tp {n_prefill}), 1 decode node (--tp {n_decode}), router; "
            f"store {name}, fault: {fault}[/bold]"
        )
        started_s = time.monotonic()
        with store(name, directory) as (extra, server):
            cluster = Cluster(
                self._model,
                name,
                extra,
                page_size=PAGE_SIZE,
                transfer=self._transfer,
                flags=["--storage-head-group", "1"] if max(self._tp) > 1 else [],
                tp=((n_prefill, n_prefill), (n_decode,)),
            )
            try:
                turns = play(cluster, self._shape, _breaking(cluster, fault, server))
                say(self._nodes(cluster))
            finally:
                cluster.close()
        loaded = load_model(self._model, "cpu")  # only now: the servers need the memory
        right = [
            list(turn.answer) == plain_answer(loaded, turn.prompt, len(turn.answer))
            for turn in turns
        ]
        say(_table(turns, right))
        n_wrong = right.count(False)
        say(f"{right.count(True)} of {len(right)} answers are those of one plain model")
        if fault == "none":
            n_wrong += self._check_hits(turns)
        say(f"took {time.monotonic() - started_s:.0f} s\n")
        return n_wrong

    def _check_hits(self, turns: Sequence[Turn]) -> int:
        try:
            check_hits(turns, self._shape)
        except AssertionError as error:
            self._console.print(f"[red]hits are not as expected[/red]: {error}")
            return 1
        self._console.print("from turn 2 on, every prompt found all that was computed before it")
        return 0

    def _nodes(self, cluster: Cluster) -> Table:
        table = Table("node", "sent", "received", "recomputed", "MB", title="KV between nodes")
        for node in (*cluster.prefill, cluster.decode):
            if node.is_alive:
                figures = cluster.figures(node)
                counts = [str(figures[key]) for key in ("sent", "received", "recomputed")]
                table.add_row(node.name, *counts, f"{figures['nbytes'] / 1e6:.1f}")
        return table


def _breaking(cluster: Cluster, fault: str, server: Any) -> Callable[[int], None]:
    """What happens before each turn."""

    def between(turn: int) -> None:
        if fault == "kill" and turn == 1:
            cluster.kill_prefill(0)
        elif fault == "kill" and turn == 2:
            cluster.restart_prefill(0)
        elif fault == "pause" and turn == 1:
            assert server is not None, "only redis can be paused here"
            server.freeze()
            threading.Timer(PAUSE_S, server.thaw).start()

    return between


def _table(turns: Sequence[Turn], right: Sequence[bool]) -> Table:
    table = Table(title="Turns")
    columns = ("talk", "turn", "prefill node", "prompt", "device", "host", "storage", "computed")
    for column in (*columns, "tokens"):
        table.add_column(column, justify="right")
    names = {url: f"{n}" for n, url in enumerate(sorted({turn.prefill for turn in turns}))}
    for turn, is_right in zip(turns, right, strict=True):
        cached: CachedTokens = turn.cached
        table.add_row(
            *map(str, (turn.conversation + 1, turn.turn + 1, names[turn.prefill])),
            *map(str, (len(turn.prompt), cached.device, cached.host, cached.storage)),
            str(len(turn.prompt) - cached.total),
            "as plain" if is_right else "[red]wrong[/red]",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
