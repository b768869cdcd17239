"""What it costs to offload generated pages while decoding: a decode step with and without.

SmolLM2 where it is installed, else a small random model. The two take turns, so that a noisy
machine is noisy for both; by CPU time, the copies and writes of other threads count in full.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Row
from hicache_core.config import HiCacheConfig
from hicache_core.engine.engine import Engine, EngineConfig
from hicache_core.engine.model import LoadedModel, find_smollm2, load_gguf
from hicache_core.engine.request import Output, Request, SamplingParams
from hicache_core.errors import ConfigError

TABLE = "offload of generated pages while decoding (4 sequences, page of 16 tokens, file storage)"
N_SEQUENCES = 4
PAGE_SIZE = 16
N_PROMPT = 32


def rows(quick: bool) -> Iterator[Row]:
    """Time of a decode step of all sequences, without offload and with it."""
    torch.set_num_threads(1)
    loaded = _model()
    n_pages, repeat = (1, 3) if quick else (4, 9)
    folder = Path(tempfile.mkdtemp(prefix="hicache-bench-"))
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder)
        engines = {stride: _engine(loaded, stride, folder / str(stride)) for stride in (0, 1)}
        for engine in engines.values():
            undo.callback(engine.close)
        wall: dict[int, list[float]] = {stride: [] for stride in engines}
        cpu: dict[int, list[float]] = {stride: [] for stride in engines}
        for turn in range(-1, repeat):
            for stride, engine in engines.items():
                wall_s, cpu_s = _decode(engine, turn + 1, 1 + n_pages * PAGE_SIZE)
                if turn >= 0:  # the first turn warms up
                    wall[stride].append(1e3 * wall_s)
                    cpu[stride].append(1e3 * cpu_s)
    for stride, name in ((0, "offload at the end"), (1, "offload of every page")):
        yield Row(
            TABLE,
            name,
            "ms/step",
            wall[stride],
            cpu[stride],
            baseline="offload at the end" if stride else None,
            target="at most 1.03 of it" if stride else None,
            note=loaded.name,
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


def _engine(loaded: LoadedModel, stride: int, folder: Path) -> Engine:
    """An open engine that has room for one turn, and evicts what earlier ones left."""
    cache = HiCacheConfig(
        page_size=PAGE_SIZE,
        hicache_storage_backend="file",
        hicache_storage_backend_extra_config={"path": str(folder)},
    )
    settings = EngineConfig(max_running=N_SEQUENCES, device_tokens=2048, offload_stride=stride)
    engine = Engine(loaded, cache, settings)
    engine.open()
    return engine


def _decode(engine: Engine, turn: int, n_new: int) -> tuple[float, float]:
    """Seconds of a decode step: by wall clock, and by CPU time of the process."""
    ended = threading.Semaphore(0)
    marks: list[tuple[float, float]] = []

    def take(output: Output) -> None:
        if output.completion_tokens == 1 or output.finish_reason is not None:
            marks.append((time.perf_counter(), time.process_time()))
        if output.finish_reason is not None:
            ended.release()

    for n in range(N_SEQUENCES):
        prompt = tuple(1000 + 997 * turn + 37 * n + at for at in range(N_PROMPT))
        sampling = SamplingParams(max_new_tokens=n_new, temperature=0.0, ignore_eos=True)
        engine.submit(Request(f"{turn}-{n}", prompt, sampling), take)
    for _ in range(N_SEQUENCES):
        ended.acquire()
    first, last = marks[N_SEQUENCES - 1], marks[-1]
    n_steps = n_new - 1
    return (last[0] - first[0]) / n_steps, (last[1] - first[1]) / n_steps
