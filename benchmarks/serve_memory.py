"""Memory of ``hicache serve`` beside weights and pools: at rest, and while requests come and go.

At rest SmolLM2 where it is installed. The requests go to a small random model, whose answers take
little time: what a request leaves behind does not depend on the size of the weights.
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
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models

from benchmarks.harness import Row
from hicache_core.engine.model import find_smollm2
from hicache_core.errors import ConfigError

TABLE = "memory of hicache serve beside weights and pools (host tier and file storage)"
N_TOKENS = 2048
N_AT_ONCE = 8
MB = 1e6
SMOLLM2_ROW_NBYTES = 30 * 2 * 3 * 64 * 4
"""Layers, keys and values, heads, width, bytes of a float32."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        pid: of its process.
        url: where it listens.
        pools_nbytes: bytes of device pool and host pool.
    """

    pid: int
    url: str
    pools_nbytes: int

    def own_nbytes(self) -> float:
        """Resident bytes that are neither weights, which are mapped, nor pools."""
        text = Path(f"/proc/{self.pid}/smaps").read_text()
        resident = 0
        is_weights = False
        for line in text.splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                is_weights = line.endswith(".safetensors")
            elif line.startswith("Rss:") and not is_weights:
                resident += 1024 * int(line.split()[1])
        return resident - self.pools_nbytes

    def anonymous_nbytes(self) -> float:
        """Those of them that no file holds: libraries are left out."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", text)
        assert found is not None
        return 1024 * int(found[1]) - self.pools_nbytes

    def ask(self, n: int) -> None:
        """One short request, unlike all others."""
        chance = random.Random(n)
        body = {
            "input_ids": [chance.randrange(10, 500) for _ in range(80)],
            "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
        }
        request = urllib.request.Request(
            f"{self.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=600).read()


def rows(quick: bool) -> Iterator[Row]:
    """Resident memory at rest, and after each part of many requests."""
    n_requests = 40 if quick else 2000
    with contextlib.suppress(ConfigError):
        find_smollm2()
        with _served("smollm2", SMOLLM2_ROW_NBYTES) as server:
            at_rest = [server.own_nbytes() / MB]
            note = f"{server.anonymous_nbytes() / MB:.0f} MB of them are no pages of libraries"
        yield Row(TABLE, "SmolLM2, at rest", "MB", at_rest, target="at most 500 MB", note=note)
    with tempfile.TemporaryDirectory(prefix="hicache-bench-") as folder:
        _save_small(Path(folder))
        with _served(folder, 4 * 2 * 2 * 16 * 4) as server:
            yield Row(TABLE, "small model, at rest", "MB", [server.own_nbytes() / MB])
            done = 0
            for n in (n_requests // 4, n_requests // 2, n_requests):
                with ThreadPoolExecutor(N_AT_ONCE) as threads:
                    list(threads.map(server.ask, range(done, n)))
                done = n
                yield Row(
                    TABLE,
                    f"small model, after {n:,} requests",
                    "MB",
                    [server.own_nbytes() / MB],
                    baseline="small model, at rest",
                    target="flat",
                )


@contextlib.contextmanager
def _served(model: str, row_nbytes: int) -> Iterator[Server]:
    """A server of a model whose KV takes ``row_nbytes`` for each token."""
    with tempfile.TemporaryDirectory(prefix="hicache-bench-") as store:
        command = [sys.executable, "-m", "hicache_core", "serve", "--model", model, "--port", "0"]
        command += ["--max-total-tokens", str(N_TOKENS), "--enable-hierarchical-cache"]
        command += ["--hicache-ratio", "2", "--hicache-storage-backend", "file"]
        command += [
            "--hicache-storage-backend-extra-config",
            json.dumps({"path": store}),
            "--log-level",
            "error",
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if found := re.search(r"serves \S+ at (http://\S+)", line):
                    yield Server(process.pid, found[1], 3 * N_TOKENS * row_nbytes)
                    break
            else:
                raise RuntimeError("the server did not start: " + "".join(said))
        finally:
            os.kill(process.pid, signal.SIGTERM)
            process.stdout.close()
            process.wait(60)


def _save_small(folder: Path) -> None:
    """A random Llama, and a tokenizer of one token, which requests with token ids do not use."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<end>": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
