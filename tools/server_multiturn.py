"""A model behind ``hicache serve``: conversations of several turns, by what caches them.

    python -m tools.server_multiturn [--model NAME] [--clients 8] [--rounds 6] [--tiers none ...]

``make bench`` does not run it: it takes minutes, and starts a server for each row. A row is a
fresh server on an empty store; rows with storage are run once more after a restart, on the warm
store. The load is that of ``hicache bench multiturn``; half of a first question is the same for
all.

``none`` has pages longer than any prompt, so that nothing is ever cached. The device pool holds
about half of what all conversations need, and the host pool all of it; with ``small-host`` as
much as the device pool, which under ``write_through`` are the same pages.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from tests.pd.cluster import Child
from tests.pd.stores import store

STORES = ("file", "redis", "s3", "mooncake", "hf3fs")
TIERS = ("none", "device", "small-host", "host", *STORES)
PAGE_SIZE = 16
NO_PAGE = 1024
HIERARCHY = ("--enable-hierarchical-cache", "--hicache-ratio")
DRAIN_S = 120.0
HEADER = (
    "| cache | run | TTFT p50 | TTFT p99 | prompt tokens | device | host | storage | prefilled |"
)


@contextmanager
def serving(model: str, page_size: int, device_tokens: int, flags: Sequence[str]) -> Iterator[str]:
    """Starts a server on any free port and yields its address; at the end it drains its writes.

    Args:
        model: as ``--model-path``.
        page_size: tokens in a page.
        device_tokens: tokens that the device tier holds.
        flags: further flags.
    """
    command = ["-m", "hicache_core.launch_server", "--model-path", model, "--port", "0"]
    command += ["--page-size", str(page_size), "--max-total-tokens", str(device_tokens)]
    child = Child("server", [*command, "--enable-cache-report", *flags])
    try:
        child.wait()
        yield child.url
        child._process.send_signal(signal.SIGTERM)
        child._process.wait(DRAIN_S)
    finally:
        child.kill()


def measured(url: str, given: argparse.Namespace) -> dict[str, Any]:
    """The summary of one run of ``hicache bench multiturn``."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "run.json"
        load = {
            "--num-clients": given.clients,
            "--max-parallel": given.clients,
            "--num-rounds": given.rounds,
            "--request-length": given.words,
            "--output-length": given.output,
            "--shared-prefix-share": 0.5,
            "--url": url,
            "--json": file,
        }
        code = "from hicache_core.cli.main import main; main()"
        arguments = [str(word) for pair in load.items() for word in pair]
        command = [sys.executable, "-c", code, "bench", "multiturn", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(file.read_text())["summary"]
        return found


def line(tiers: str, run: str, found: dict[str, Any]) -> str:
    """One row of the table.

    Args:
        tiers: the first cell.
        run: the second cell.
        found: the summary of ``hicache bench``.
    """
    hits, n_prompt = found["hit_tokens"], found["prompt_tokens"]
    n_hits = [hits.get(tier, 0) for tier in ("device", "host", "storage")]
    times = [f"{found['ttft_s'][share]:.2f} s" for share in ("p50", "p99")]
    cells = [tiers, run, *times, n_prompt, *n_hits, n_prompt - sum(n_hits)]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def rows(tiers: str, given: argparse.Namespace, directory: Path) -> Iterator[str]:
    """The rows of one way to cache.

    Args:
        tiers: ``none``, ``device``, ``small-host``, ``host`` or the name of a storage backend.
        given: the command line.
        directory: where a storage backend keeps its files.
    """
    n_tokens = given.clients * given.rounds * (given.words + given.output) // 2
    device_tokens = -(-n_tokens // PAGE_SIZE) * PAGE_SIZE
    if tiers == "none":
        with serving(given.model, NO_PAGE, NO_PAGE * (given.clients + 1), ()) as url:
            yield line(tiers, "cold", measured(url, given))
    elif tiers == "device":
        with serving(given.model, PAGE_SIZE, device_tokens, ()) as url:
            yield line(tiers, "cold", measured(url, given))
    elif tiers in {"small-host", "host"}:
        ratio = 1 if tiers == "small-host" else 2
        with serving(given.model, PAGE_SIZE, device_tokens, [*HIERARCHY, str(ratio)]) as url:
            yield line(f"device + host of {ratio} x", "cold", measured(url, given))
    else:
        with store(tiers, directory) as (settings, _):
            flags = [*HIERARCHY, "2", "--hicache-storage-backend", tiers]
            flags += ["--hicache-storage-prefetch-policy", "wait_complete"]
            extra = {**settings, "prefetch_threshold": PAGE_SIZE}
            flags += ["--hicache-storage-backend-extra-config", json.dumps(extra)]
            for run in ("cold", "after a restart"):
                with serving(given.model, PAGE_SIZE, device_tokens, flags) as url:
                    yield line(f"+ {tiers}", run, measured(url, given))


def main() -> None:
    """Prints the table as Markdown, each row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--words", type=int, default=64, help="of each question")
    parser.add_argument("--output", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--tiers", nargs="*", default=list(TIERS), choices=TIERS)
    given = parser.parse_args()
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    print(f"Machine: {facts}. {given.model}, {given.clients} clients, {given.rounds} rounds.\n")
    print(HEADER, "|---" * 9 + "|", sep="\n", flush=True)
    for tiers in given.tiers:
        with tempfile.TemporaryDirectory(prefix="hicache-bench-") as directory:
            for row in rows(tiers, given, Path(directory)):
                print(row, flush=True)


if __name__ == "__main__":
    main()
