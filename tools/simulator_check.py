"""The simulator beside a real server: times to first token of a trace in three settings.

    python -m tools.simulator_check [--requests N] [--rate R] [--json FILE]

Starts ``hicache serve`` with SmolLM2 on this machine: with the device tier alone, with a host tier,
and with the file backend below it. ``hicache bench replay`` sends a generated trace, and the same
trace is simulated, with the speed of the server that requests one at a time had before and after
it, and with that of the file backend by ``hicache conformance``. It takes some ten minutes, and
needs an otherwise idle machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from hicache_core.bench.result import percentile
from hicache_core.bench.traces import read_trace
from hicache_core.fleet.measured import fit_speed, read_storage
from hicache_core.fleet.setting import Setting, Speed
from hicache_core.fleet.simulation import Load, simulate

BLOCK = 64
TOKEN_NBYTES = 30 * 2 * 3 * 64 * 4
"""SmolLM2: layers, keys and values, KV heads, width, bytes of a float32."""
DEVICE_TOKENS = 4096
HOST_TOKENS = {"device": 0, "host": 16384, "storage": 5120}
CHUNK_TOKENS = 512
N_DOCUMENTS = 8
N_MEASURED = 8
N_PARALLEL = 4
SETTLE_S = 3.0
"""After so long a server has stored what it computed, and its cache can be emptied."""


@dataclass(frozen=True)
class Compared:
    """Times to first token of one setting, in seconds.

    Attributes:
        name: of the setting.
        speed: of the server, as it was measured.
        real: of the server, by request.
        simulated: of the simulator.
        real_hits: tokens of prompts that the server's tiers had, in all.
        simulated_hits: those of the simulator.
    """

    name: str
    speed: Speed
    real: list[float]
    simulated: list[float]
    real_hits: int
    simulated_hits: int

    def lines(self) -> Iterator[str]:
        """The comparison in words."""
        yield f"{self.name}: {self.speed}"
        yield f"  hit tokens {self.real_hits:,} real, {self.simulated_hits:,} simulated"
        for share in (0.5, 0.9, 0.99):
            real, simulated = percentile(self.real, share), percentile(self.simulated, share)
            assert real is not None
            assert simulated is not None
            yield _line_of(f"p{100 * share:.0f}", real, simulated)
        yield _line_of("mean", *(sum(one) / len(one) for one in (self.real, self.simulated)))


def _line_of(what: str, real: float, simulated: float) -> str:
    return f"  {what:4} {real:.3f} s real, {simulated:.3f} s simulated, {simulated / real:.2f} ×"


@click.command()
@click.option("--requests", "n_requests", default=30, show_default=True, help="In the trace.")
@click.option("--rate", default=0.25, show_default=True, help="Arrivals a second, on average.")
@click.option("--only", multiple=True, type=click.Choice(list(HOST_TOKENS)), help="A setting.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all times here.")
def main(n_requests: int, rate: float, only: tuple[str, ...], json_file: Path | None) -> None:
    """Compares, setting by setting."""
    found = []
    with tempfile.TemporaryDirectory(prefix="hicache-simulator-") as name:
        folder = Path(name)
        trace = _trace(folder / "trace.jsonl", n_requests, rate)
        for setting in only or tuple(HOST_TOKENS):
            one = _compare(setting, trace, folder)
            found.append(one)
            click.echo("\n".join(one.lines()))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(one) for one in found], indent=1))


def _trace(file: Path, n_requests: int, rate: float) -> Path:
    """Questions on documents of 8 to 14 blocks, in Mooncake's format."""
    chance = random.Random(5)
    sizes = [chance.randrange(8, 15) for _ in range(N_DOCUMENTS)]
    at_ms, lines = 0.0, []
    for n in range(n_requests):
        document = chance.randrange(N_DOCUMENTS)
        own = [10_000 + 10 * n + k for k in range(chance.randrange(1, 4))]
        ids = [100 * document + k for k in range(sizes[document])] + own
        lines.append(_line(round(at_ms), ids, 8))
        at_ms += 1000 * chance.expovariate(rate)
    file.write_text("".join(lines))
    return file


def _line(at_ms: int, ids: Sequence[int], n_output: int) -> str:
    row = {
        "timestamp": at_ms,
        "input_length": BLOCK * len(ids),
        "output_length": n_output,
        "hash_ids": ids,
    }
    return json.dumps(row) + "\n"


def _calibration(folder: Path) -> tuple[Path, Path]:
    """Requests of many lengths, each followed by one that continues it; and some short ones."""
    chance, lines = random.Random(6), []
    for n in range(N_MEASURED):
        new = [20_000 + 100 * n + k for k in range(1 + chance.randrange(16))]
        lines.append(_line(n, new, 12))
        lines.append(_line(n, [*new, 50_000 + n], 12))
    alone, together = folder / "alone.jsonl", folder / "together.jsonl"
    alone.write_text("".join(lines))
    together.write_text("".join(_line(0, [60_000 + n], 32) for n in range(N_PARALLEL)))
    return alone, together


def _compare(name: str, trace: Path, folder: Path) -> Compared:
    """Replays the trace between two measurements of the server's speed, and simulates it."""
    alone, together = _calibration(folder)
    one_by_one = ("--flush-cache", "--max-parallel", "1")
    with _server(name, folder) as url:
        _replay(url, alone, folder, "--limit", "4", *one_by_one)  # warms up
        before = _replay(url, alone, folder, *one_by_one)
        found = _replay(url, trace, folder, "--flush-cache")
        after = _replay(url, alone, folder, *one_by_one)
        at_once = _replay(url, together, folder, "--flush-cache")
    speed = _speed([before, after], at_once)
    made = simulate(_setting(name, speed, folder), read_trace(trace, block_tokens=BLOCK), Load())
    replies = [one["reply"] for one in sorted(found["requests"], key=lambda one: one["client"])]
    served = sorted(made.served, key=lambda one: one.number)
    return Compared(
        name,
        speed,
        [one["ttft_s"] for one in replies],
        [one.first_s - one.arrived_s for one in served],
        sum(one["cached_tokens"] for one in replies),
        sum(made.hit_tokens.values()),
    )


def _speed(runs: Sequence[dict[str, Any]], at_once: dict[str, Any]) -> Speed:
    """The speed of requests one at a time, and what each further sequence adds to a step."""
    requests, begins_s = [], 0.0
    for run in runs:
        requests += [one | {"sent_s": one["sent_s"] + begins_s} for one in run["requests"]]
        begins_s += run["summary"]["elapsed_s"] + 1.0
    speed = fit_speed("speed", requests)
    replies = [one["reply"] for one in at_once["requests"]]
    step_s = min((one["latency_s"] - one["ttft_s"]) / (one["output_tokens"] - 1) for one in replies)
    more_s = step_s - speed.step_s(1, N_PARALLEL * 2 * BLOCK)
    return replace(speed, sequence_s=max(0.0, more_s / (N_PARALLEL - 1)))


def _setting(name: str, speed: Speed, folder: Path) -> Setting:
    setting = Setting(
        device_gb=(DEVICE_TOKENS + 1) * TOKEN_NBYTES / 1e9,
        host_gb=HOST_TOKENS[name] and (HOST_TOKENS[name] + 1) * TOKEN_NBYTES / 1e9,
        token_nbytes=TOKEN_NBYTES,
        layers=30,
        max_running=8,
        chunk_tokens=CHUNK_TOKENS,
        bus_nbytes_per_s=_copied_nbytes_per_s(),
        speed=speed,
    )
    if name != "storage":
        return setting
    report, store = folder / "report.json", folder / "measured"
    config = json.dumps({"path": str(store)})
    _hicache("conformance", "file", "--quick", "--config", config, "--json", str(report))
    return replace(setting, storage_gb=float("inf"), storage=read_storage(report))


def _copied_nbytes_per_s() -> float:
    """The bandwidth of memory, by copies of 64 MiB."""
    source = torch.ones(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    return source.nbytes / best


def _replay(url: str, trace: Path, folder: Path, *more: str) -> dict[str, Any]:
    out = folder / "bench.json"
    time.sleep(SETTLE_S)
    blocks = ("--trace-block-tokens", str(BLOCK))
    _hicache("bench", "replay", str(trace), "--url", url, *blocks, "--json", str(out), *more)
    found = json.loads(out.read_text())
    assert isinstance(found, dict)
    return found


def _hicache(*arguments: str) -> None:
    command = [sys.executable, "-m", "hicache_core", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"hicache {arguments[0]}: {done.stdout}{done.stderr}")


@contextlib.contextmanager
def _server(name: str, folder: Path) -> Iterator[str]:
    """The URL of a running server."""
    command = [sys.executable, "-m", "hicache_core", "serve", "--model-path", "smollm2"]
    command += ["--port", "0", "--log-level", "error", "--enable-cache-report"]
    command += ["--max-total-tokens", str(DEVICE_TOKENS)]
    if HOST_TOKENS[name]:
        gb = (HOST_TOKENS[name] + 1) * TOKEN_NBYTES / 1e9
        command += ["--enable-hierarchical-cache", "--hicache-size", str(gb)]
    if name == "storage":
        config = json.dumps({"path": str(folder / "store")})
        command += ["--hicache-storage-backend", "file"]
        command += ["--hicache-storage-backend-extra-config", config]
        command += ["--hicache-storage-prefetch-policy", "wait_complete"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r" serves \S+ at (http://\S+)", line):
                yield found[1]
                break
        else:
            raise click.ClickException("the server did not start: " + "".join(said))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


if __name__ == "__main__":
    main()
