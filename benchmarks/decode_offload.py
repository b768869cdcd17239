"""What it costs to offload generated pages while decoding, beside the decode step itself.

SmolLM2 where it is installed, else a small random model. By CPU time and inside one run: the
speeds of two runs differ by more than the offload costs on a machine that others use.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Row
from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.engine import Engine, EngineConfig
from hicache_core.engine.model import LoadedModel, find_smollm2, load_gguf
from hicache_core.engine.request import Output, Request, SamplingParams
from hicache_core.errors import ConfigError

TABLE = "offload of generated pages while decoding (4 sequences, page of 16 tokens, file storage)"
N_SEQUENCES = 4
PAGE_SIZE = 16
N_PROMPT = 32


def rows(quick: bool) -> Iterator[Row]:
    """CPU time of a decode step of all sequences, without and with the offload of every page."""
    torch.set_num_threads(1)  # so that what other threads use is not the model's
    loaded = _model()
    n_pages, repeat = (1, 2) if quick else (4, 5)
    folder = Path(tempfile.mkdtemp(prefix="hicache-bench-"))
    plain_ms: list[float] = []
    offloading_ms: list[float] = []
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder)
        engine = _engine(loaded, folder)
        undo.callback(engine.close)
        for turn in range(repeat):
            plain_s, offloading_s = _decode(engine, turn, 2 + n_pages * PAGE_SIZE)
            plain_ms.append(1e3 * plain_s)
            offloading_ms.append(1e3 * offloading_s)
    yield Row(TABLE, "decode step", "CPU ms", plain_ms, note=loaded.name)
    yield Row(
        TABLE,
        "decode step and its share of the offload",
        "CPU ms",
        offloading_ms,
        baseline="decode step",
        target="at most 1.03 of it",
        note="copies and writes of other threads included",
    )


def _model() -> LoadedModel:
    try:
        return load_gguf(find_smollm2(), torch.float32)
    except ConfigError:
        config = LlamaConfig(
            vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=8
        )
        model: Any = LlamaForCausalLM(config)
        return LoadedModel("random Llama of 8 layers", model.eval(), None)


def _engine(loaded: LoadedModel, folder: Path) -> Engine:
    """An open engine that offloads each page as it is full."""
    cache = HiCacheConfig(
        page_size=PAGE_SIZE,
        hicache_storage_backend="file",
        hicache_host_retention="free_once_stored",
        hicache_storage_backend_extra_config={"path": str(folder)},
    )
    settings = EngineConfig(max_running=N_SEQUENCES, device_tokens=2048, offload_stride=1)
    engine = Engine(loaded, cache, settings)
    engine.open()
    return engine


def _decode(engine: Engine, turn: int, n_new: int) -> tuple[float, float]:
    """CPU seconds of a decode step without, and with its share of the offload.

    All sequences fill a page in the same step. What that step takes more than the median of the
    others is the engine's own share; what the process uses beside the engine's thread is the rest.
    """
    ended = threading.Semaphore(0)
    marks: list[tuple[float, float]] = []  # of the engine's thread and of the process, each step

    def take(output: Output) -> None:
        if output.request_id == f"{turn}-{N_SEQUENCES - 1}" and output.new_tokens:
            marks.append((time.thread_time(), time.process_time()))
        if output.finish_reason is not None:
            ended.release()

    def submit_all(_: HiCache) -> None:
        for n in range(N_SEQUENCES):
            prompt = tuple(1000 + 997 * turn + 37 * n + at for at in range(N_PROMPT))
            sampling = SamplingParams(max_new_tokens=n_new, temperature=0.0, ignore_eos=True)
            engine.submit(Request(f"{turn}-{n}", prompt, sampling), take)

    engine.call(submit_all, timeout_s=60.0)  # between two steps: all begin in the same one
    for _ in range(N_SEQUENCES):
        ended.acquire()
    marks = marks[1:-1]  # the last step ends the requests, the first began them
    steps = [after[0] - before[0] for before, after in itertools.pairwise(marks)]
    plain_s = statistics.median(steps)
    own_s = sum(steps[at] - plain_s for at in range(PAGE_SIZE - 2, len(steps), PAGE_SIZE))
    others_s = (marks[-1][1] - marks[0][1]) - (marks[-1][0] - marks[0][0])
    return plain_s, plain_s + (max(0.0, own_s) + others_s) / len(steps)
