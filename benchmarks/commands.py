"""How long commands take that need no model: each is a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.harness import Row
from hicache_core.engine.tokenizer import remember

TABLE = "commands that need no model"


def rows(quick: bool) -> Iterator[Row]:
    """Wall time, and CPU time of the process, of one command after the other."""
    repeat = 3 if quick else 10
    with tempfile.TemporaryDirectory() as directory:
        nowhere = f'{{"path": "{directory}/nowhere"}}'
        why = ["why", "--backend", "file", "--config", nowhere]
        # As where it is installed: the modules are compiled once, by the first call.
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": f"{directory}/compiled"}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        yield _row("hicache --help", ["--help"], repeat, environ, "≤ 300 ms")
        yield _row("hicache why, token ids", [*why, "1,2,3"], repeat, environ)
        if folder := _tokenizer(Path(directory) / "model"):
            given = [*why, "--tokenizer", str(folder), "What is a prefix cache?"]
            yield _row("hicache why, a text", given, repeat, environ, "≤ 1,500 ms")


def _tokenizer(folder: Path) -> Path | None:
    """SmolLM2's, as it is after the model was loaded once; None where it is not installed."""
    from hicache_core.engine.packaged import PACKAGED
    from hicache_core.errors import ConfigError

    try:
        import torch

        tokenizer = PACKAGED["smollm2"](torch.float32).tokenizer
    except ConfigError:
        return None
    tokenizer.save_pretrained(folder)
    remember(folder, tokenizer)
    return folder


def _row(
    name: str,
    arguments: Sequence[str],
    repeat: int,
    environ: Mapping[str, str],
    target: str | None = None,
) -> Row:
    command = [sys.executable, "-m", "hicache_core", *arguments]
    wall, cpu = [], []
    for warm in range(-1, repeat):
        before, start = _cpu_s(), time.perf_counter()
        subprocess.run(command, check=False, capture_output=True, env=environ)
        if warm >= 0:
            wall.append(1e3 * (time.perf_counter() - start))
            cpu.append(1e3 * (_cpu_s() - before))
    return Row(TABLE, name, "ms", wall, cpu, None, target)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
