"""HiCacheConnector's two sides under vLLM's own scheduler, with real blocks of torch.

Only the model is emulated. The "KV" of a token is a checksum of all tokens up to it, so that every
step can check what attention would read, and the next token follows from it.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MLAAttentionSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from hicache_core.errors import HiCacheError
from hicache_core.integrations.vllm import HiCacheConnector

BLOCK = 32
HEAD = 4
LAYERS = ["layers.0", "layers.1"]
PAGE_NBYTES = len(LAYERS) * BLOCK * 2 * HEAD * 2
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}


def checksums(tokens: Sequence[int], salt: str = "") -> list[int]:
    """The emulated KV of each token: 15 bits that depend on all tokens up to it."""
    found, so_far = [], zlib.crc32(salt.encode())
    for token in tokens:
        so_far = zlib.crc32(token.to_bytes(4, "little"), so_far)
        found.append(so_far & 0x7FFF)
    return found


def answer(prompt: Sequence[int], n_new: int, salt: str = "") -> list[int]:
    """What the emulated model answers."""
    tokens = list(prompt)
    for _ in range(n_new):
        tokens.append(checksums(tokens, salt)[-1] % 500)
    return tokens[len(prompt) :]


def configured(folder: Path, n_workers: int = 1, role: str = "kv_both", **settings: Any) -> Any:
    """vLLM's configuration of a small model, with steps of 96 tokens at most."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODEL))
    transfer = KVTransferConfig(
        kv_connector="HiCacheConnector",
        kv_connector_module_path="hicache_core.integrations.vllm",
        kv_role=role,
        kv_connector_extra_config={
            "backend": "file",
            "backend_config": {"path": str(folder / "store")},
            **settings,
        },
    )
    config = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        block_size=BLOCK,
        max_model_len=1024,
        max_num_batched_tokens=96,
        max_num_seqs=8,
        async_scheduling=False,
        kv_transfer_config=transfer,
    ).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"
    config.parallel_config.tensor_parallel_size = n_workers
    config.parallel_config.world_size = n_workers
    return config


def blocks_of_a_model(n_blocks: int, spec: Any = None) -> KVCacheConfig:
    """One group of full attention."""
    spec = spec or FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=HEAD, dtype=torch.bfloat16
    )
    size = n_blocks * PAGE_NBYTES
    page = PAGE_NBYTES // len(LAYERS)
    return KVCacheConfig(
        num_blocks=n_blocks,
        kv_cache_tensors=[KVCacheTensor(size, LAYERS, page * n_blocks, page)],
        kv_cache_groups=[KVCacheGroupSpec(LAYERS, spec)],
        kv_cache_layout="LBHNC",
    )


class Worker:
    """One worker: blocks, and the connector's half."""

    def __init__(self, config: Any, cache: KVCacheConfig, rank: int) -> None:
        own = copy.deepcopy(config)
        own.parallel_config.rank = rank
        self.rank = rank
        self.kv = {
            layer: torch.zeros((cache.num_blocks, 1, BLOCK, 2 * HEAD), dtype=torch.int16)
            for layer in LAYERS
        }
        self.connector = HiCacheConnector(own, KVConnectorRole.WORKER, cache)
        self.connector.register_kv_caches(self.kv)

    def value(self, layer: int, checksum: int) -> int:
        """What stands in a slot of a layer."""
        return (checksum + layer + 7 * self.rank) & 0x7FFF

    def read(self, block_ids: Sequence[int], expected: Sequence[int]) -> None:
        """Checks what attention reads: the KV of the tokens before those of the step."""
        for n, kv in enumerate(self.kv.values()):
            rows = kv[list(block_ids)].reshape(-1, 2 * HEAD)[: len(expected)]
            wanted = torch.tensor([self.value(n, one) for one in expected], dtype=torch.int16)
            assert (rows == wanted[:, None]).all(), f"wrong KV, rank {self.rank}, layer {n}"

    def write(self, block_ids: Sequence[int], first: int, values: Sequence[int]) -> None:
        """Writes the KV of the step's tokens."""
        for n, kv in enumerate(self.kv.values()):
            for place, one in enumerate(values, first):
                kv[block_ids[place // BLOCK], 0, place % BLOCK] = self.value(n, one)

    def run(self, out: Any, compute: Callable[[Worker], None]) -> KVConnectorOutput:
        """A step, with the connector's calls in vLLM's order."""
        self.connector.bind_connector_metadata(out.kv_connector_metadata)
        if out.has_sync_kv_loads:
            self.connector.start_load_kv(None)
        compute(self)
        if not out.has_sync_kv_loads:
            self.connector.start_load_kv(None)
        self.connector.wait_for_save()
        results = self.connector.get_transfer_results(out.finished_req_ids)
        said = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            invalid_block_ids=self.connector.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=self.connector.build_connector_worker_meta(),
        )
        self.connector.clear_connector_metadata()
        assert not said.invalid_block_ids
        return said


class Engine:
    """vLLM's scheduler, its workers, and an emulated model."""

    def __init__(self, folder: Path, n_blocks: int = 25, n_workers: int = 1, **settings: Any):
        init_none_hash(sha256)
        self.config = configured(folder, n_workers, **settings)
        cache = blocks_of_a_model(n_blocks)
        self.config.cache_config.num_gpu_blocks = n_blocks
        self.scheduler = Scheduler(
            vllm_config=self.config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
        )
        self.workers = [Worker(self.config, cache, rank) for rank in range(n_workers)]
        self._aggregate = KVOutputAggregator(n_workers)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._n_requests = 0
        self.answers: dict[str, list[int]] = {}
        self.n_loaded: dict[str, int] = {}
        self.n_resumed = 0

    def add(self, prompt: Sequence[int], n_new: int = 4, salt: str | None = None) -> str:
        """A new request."""
        self._n_requests += 1
        name = f"request-{self._n_requests}"
        sampling = SamplingParams(max_tokens=n_new, ignore_eos=True, temperature=0)
        sampling.update_from_generation_config({}, None)
        request = Request(
            name, list(prompt), sampling, None, cache_salt=salt, block_hasher=self._hasher
        )
        self.answers[name] = []
        self.scheduler.add_request(request)
        return name

    def step(self) -> None:
        """One step of the engine."""
        out = self.scheduler.schedule()
        computed = {new.req_id: new.num_computed_tokens for new in out.scheduled_new_reqs}
        cached = out.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self.n_resumed += len(cached.resumed_req_ids)
        for load in out.kv_connector_metadata.step.loads:
            self.n_loaded["all"] = self.n_loaded.get("all", 0) + len(load.block_ids)
        sampled: dict[str, list[int]] = {}

        def compute(worker: Worker) -> None:
            for name, n_new in out.num_scheduled_tokens.items():
                request = self.scheduler.requests[name]
                blocks = self.scheduler.kv_cache_manager.get_block_ids(name)[0]
                tokens = list(request.all_token_ids)
                first, behind = computed[name], computed[name] + n_new
                values = checksums(tokens, request.cache_salt or "")
                worker.read(blocks, values[:first])
                worker.write(blocks, first, values[first:behind])
                sampled[name] = [values[-1] % 500] if behind >= len(tokens) else []

        said = []
        for worker in self.workers:
            kv_said = worker.run(out, compute)
            names = list(out.num_scheduled_tokens)
            said.append(
                ModelRunnerOutput(
                    req_ids=names,
                    req_id_to_index={name: n for n, name in enumerate(names)},
                    sampled_token_ids=[sampled[name] for name in names],
                    kv_connector_output=kv_said,
                )
            )
        found = self.scheduler.update_from_output(out, self._aggregate.aggregate(said))
        for outputs in found.values():
            for one in outputs.outputs:
                self.answers[one.request_id] += one.new_token_ids
                assert one.finish_reason is None or str(one.finish_reason) in ("length", "abort")

    def run(self, seconds: float = 60.0) -> None:
        """Steps until no request is left."""
        until = time.monotonic() + seconds
        while self.scheduler.has_unfinished_requests():
            assert time.monotonic() < until, "a request does not end"
            self.step()
        self.step()  # tells the workers of drops

    def ask(self, *prompts: Sequence[int], n_new: int = 4, salt: str | None = None) -> int:
        """Runs prompts at once, checks the answers, and returns how many blocks were loaded."""
        before = self.n_loaded.get("all", 0)
        names = [self.add(prompt, n_new, salt) for prompt in prompts]
        self.run()
        for name, prompt in zip(names, prompts, strict=True):
            assert self.answers[name] == answer(prompt, n_new, salt or "")
        return self.n_loaded.get("all", 0) - before

    def settle(self) -> None:
        """Waits until everything is stored."""
        until = time.monotonic() + 20
        for worker in self.workers:
            while worker.connector._mover._store.n_in_flight:
                assert time.monotonic() < until
                time.sleep(0.001)

    def close(self) -> None:
        """Checks that nothing is left, and closes."""
        self.settle()
        plans = self.scheduler.connector._plans
        assert (len(plans), plans.n_fetches) == (0, 0)
        for worker in self.workers:
            mover = worker.connector._mover
            assert mover._fetches.n_free == mover._fetches._max_pages == mover._n_free
            worker.connector.shutdown()


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Engine]:
    """An engine that is checked and closed at the end."""
    running = Engine(folder, **options)
    yield running
    running.close()


def prompt(seed: int, n_tokens: int = 200) -> list[int]:
    return [random.Random(seed + n * 1000).randrange(500) for n in range(n_tokens)]


def damage(folder: Path, tokens: Sequence[int], block: int) -> None:
    """Flips a bit of the stored page of a block."""
    values = checksums(tokens)[block * BLOCK : (block + 1) * BLOCK]
    wanted = torch.tensor(values, dtype=torch.int16).repeat_interleave(2 * HEAD).numpy().tobytes()
    for file in folder.rglob("*"):
        if file.is_file() and (at := file.read_bytes().find(wanted)) >= 0:
            with file.open("r+b") as segment:
                segment.seek(at + 5)
                segment.write(bytes([wanted[5] ^ 1]))
            return
    raise AssertionError("the page is in no file")


def rule_what_one_engine_computed_another_loads(folder: Path) -> None:
    with engine(folder) as first:
        assert first.ask(prompt(1), prompt(2)) == 0
    with engine(folder) as second:
        assert second.ask(prompt(1)) == 6
        assert second.ask(prompt(1), prompt(2)) == 6  # vLLM has the first itself
        assert second.ask(prompt(1)[:100] + prompt(9)[:100]) == 0


def rule_a_consumer_stores_nothing_and_a_producer_loads_nothing(folder: Path) -> None:
    with engine(folder, role="kv_consumer") as consumer:
        assert consumer.ask(prompt(1)) == 0
    with engine(folder, role="kv_producer") as producer:
        assert producer.ask(prompt(1)) == 0
    with engine(folder, role="kv_producer") as producer:
        assert producer.ask(prompt(1)) == 0
    with engine(folder, role="kv_consumer") as consumer:
        assert consumer.ask(prompt(1)) == 6


def rule_output_is_stored_as_well(folder: Path) -> None:
    with engine(folder) as first:
        first.ask(prompt(1), n_new=100)
    with engine(folder) as second:
        assert second.ask(prompt(1) + answer(prompt(1), 100)) == 9


def rule_a_damaged_page_ends_what_is_loaded_and_no_request(folder: Path) -> None:
    with engine(folder) as first:
        first.ask(prompt(1))
    damage(folder / "store", prompt(1), 3)
    with engine(folder) as second:
        assert second.ask(prompt(1)) == 3
    with engine(folder) as third:
        assert third.ask(prompt(1)) == 6


def counted(engine: Engine) -> Any:
    """What vLLM's front end is told of all workers."""
    engine.settle()
    total = HiCacheConnector.build_kv_connector_stats()
    for worker in engine.workers:
        worker.connector._next_stats_s = 0.0
        total = total.aggregate(worker.connector.get_kv_connector_stats())
    return total


def rule_what_was_moved_is_counted_and_exported(folder: Path) -> None:
    with engine(folder, n_workers=2) as first:
        first.ask(prompt(1))
        assert counted(first).data == {"blocks": {"stored": 12}, "stores": {"file": 1}}
        assert counted(first).data["blocks"] == {}
    damage(folder / "store", prompt(1), 3)  # the page of the first worker
    with engine(folder, n_workers=2) as second:
        second.ask(prompt(1))
        stats = counted(second)
        blocks = {"loaded": 6, "corrupt": 1, "stored": 6}
        assert stats.data == {"blocks": blocks, "stores": {"file": 1}}
        assert stats.reduce()["corrupt blocks"] == 1
        kinds = {kind: kind for kind in (Counter, Gauge, Histogram)}
        metrics = HiCacheConnector.build_prom_metrics(second.config, kinds, ["engine"], {0: ["0"]})
        metrics.observe(stats.to_dict())
        labels = {"engine": "0", "outcome": "corrupt"}
        assert REGISTRY.get_sample_value("hicache:blocks_total", labels) == 1
        labels = {"engine": "0", "store": "file"}
        assert REGISTRY.get_sample_value("hicache:store_available", labels) == 1


def rule_too_many_prompts_at_once_are_preempted_and_still_right(folder: Path) -> None:
    """Chunks of 96 tokens, and room for three of eight prompts: vLLM preempts and resumes."""
    prompts = [prompt(n, 190 + n) for n in range(8)]
    with engine(folder) as first:
        first.ask(*prompts, n_new=120)
        assert first.n_resumed > 0
    with engine(folder) as second:
        assert second.ask(*prompts, n_new=120) >= 8 * 5
        assert second.n_resumed > 0


def rule_little_host_memory_loads_and_stores_less_and_stays_right(folder: Path) -> None:
    prompts = [prompt(n) for n in range(6)]
    with engine(folder) as first:
        first.ask(*prompts)
    with engine(folder, host_bytes=4 * PAGE_NBYTES) as second:
        assert 0 < second.ask(*prompts) <= 6 * 4


def rule_two_workers_load_what_both_have(folder: Path) -> None:
    with engine(folder, n_workers=2) as first:
        assert first.ask(prompt(1), prompt(2)) == 0
    with engine(folder, n_workers=2) as second:
        assert second.ask(prompt(1), prompt(2)) == 12
    with engine(folder) as alone:  # its blocks have other bytes
        assert alone.ask(prompt(1)) == 0
    damage(folder / "store", prompt(2), 2)
    with engine(folder, n_workers=2) as third:
        assert third.ask(prompt(1), prompt(2)) == 6 + 2


def rule_a_salt_keeps_tenants_apart(folder: Path) -> None:
    with engine(folder) as first:
        first.ask(prompt(1), salt="one")
    with engine(folder) as second:
        assert second.ask(prompt(1), salt="another") == 0
        assert second.ask(prompt(1)) == 0
    with engine(folder) as third:
        assert third.ask(prompt(1), salt="one") == 6


def rule_aborted_requests_and_resets_leave_nothing_behind(folder: Path) -> None:
    chance = random.Random(0)
    prompts = [prompt(n % 3, 100 + 20 * n) for n in range(10)]
    for _ in range(2):
        with engine(folder) as running:
            alive: dict[str, tuple[list[int], int]] = {}
            for _ in range(150):
                if chance.random() < 0.3:
                    tokens, n_new = chance.choice(prompts), chance.randrange(1, 60)
                    alive[running.add(tokens, n_new)] = (tokens, n_new)
                if chance.random() < 0.1 and alive:
                    name = chance.choice(list(alive))
                    running.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
                    del alive[name]
                if chance.random() < 0.05:
                    running.scheduler.reset_prefix_cache(
                        reset_running_requests=True, reset_connector=True
                    )
                running.step()
            running.run()
            for name, (tokens, n_new) in alive.items():
                assert running.answers[name] == answer(tokens, n_new)
    assert running.n_loaded["all"] > 0


def rule_what_cannot_work_is_refused_at_start_in_a_sentence(folder: Path) -> None:
    cache = blocks_of_a_model(8)
    latent = MLAAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=HEAD, dtype=torch.bfloat16
    )
    slow = configured(folder)
    slow.cache_config.prefix_caching_hash_algo = "xxhash"
    unpacked = configured(folder)
    unpacked.cache_config.kv_cache_layout = "BHLNC"
    wrong = [
        (slow, cache, "starts from a random seed"),
        (unpacked, cache, "the KV layout BHLNC"),
        (configured(folder), blocks_of_a_model(8, latent), "blocks of the kind MLAAttentionSpec"),
        (configured(folder, bakcend_config={}), cache, "bakcend_config"),
        (configured(folder, backend="rediss"), cache, "no backend named 'rediss' is installed"),
        (configured(folder, backend="memory", backend_config={}), cache, "in one process"),
    ]
    for config, blocks, message in wrong:
        said = "nothing"
        with suppress(SystemExit):
            try:
                Worker(config, blocks, 0)
            except HiCacheError as error:
                said = str(error)
        assert message in said, said


KILLED = """
import sys
from pathlib import Path
from vllm_connector_rules import Engine, prompt
running = Engine(Path(sys.argv[1]))
for n in range(100):
    running.ask(prompt(n))
    print(n, flush=True)
"""


def rule_an_engine_killed_while_it_stores_leaves_right_pages_only(folder: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert child.stdout is not None
    done = []
    for line in child.stdout:
        if line.strip().isdigit():
            done.append(int(line))
        if len(done) == 8:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with engine(folder) as next_one:
        assert sum(next_one.ask(prompt(n)) for n in done) >= 6 * (len(done) - 1)
