"""Programs of others that ask the server: an evaluation, and benchmarks of serving."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hicache_core.engine.model import LoadedModel
from tests.engines.environments import ROOT, SGLANG, VLLM, program, variables
from tests.server.process import ServerProcess, server_process

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

LM_EVAL = "lm-eval-0.4.13"
AIPERF = "aiperf-0.13.0"
GUIDELLM = "guidellm-0.8.1"
PAGE = 8
TEXTS = [
    "the keeper of the library opens the door",
    "the first question is about the second room of the library",
    "what is the name of the keeper",
]
CHOICES = [
    ("the keeper of the", [" library", " door"]),
    ("the first", [" question", " name", " room"]),
]


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[ServerProcess]:
    """One server for all clients."""
    flags = ["--page-size", str(PAGE), "--enable-hierarchical-cache", "--enable-metrics"]
    flags += ["--enable-cache-report"]
    with server_process(tiny_folder, [*flags, "--max-total-tokens", "16384"]) as process:
        yield process


def alone(folder: Path) -> dict[str, str]:
    """What a client finds in ``os.environ``: no network, and no package of this environment."""
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**kept, **own, "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}


def run(folder: Path, command: list[str | Path], env: Mapping[str, str] | None = None) -> str:
    """What a client says; it must succeed."""
    with subprocess.Popen(
        list(map(str, command)),
        env=env or alone(folder),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as client:
        try:
            said, _ = client.communicate(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it has started ends with it
                os.killpg(client.pid, signal.SIGKILL)
    assert client.returncode == 0, said[-4000:]
    return said


def logprob_of(loaded: LoadedModel, before: list[int], tokens: list[int]) -> float:
    """Of all ``tokens`` behind others, by a forward without any cache."""
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([before + tokens]), use_cache=False).logits[0]
    rows = torch.log_softmax(logits.float(), -1)[len(before) - 1 : -1]
    return float(rows[range(len(tokens)), tokens].sum())


def write_task(folder: Path, name: str, lines: list[dict[str, Any]], **task: Any) -> None:
    """A task of lm-eval over a file of JSON lines."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task |= {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # YAML has JSON in it


def samples_of(folder: Path, task: str) -> list[Any]:
    """The answers to each request of a task, in order."""
    (file,) = folder.glob(f"out/**/samples_{task}_*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [one["filtered_resps"] for one in sorted(found, key=lambda one: one["doc_id"])]


def test_lm_eval_measures_choices_perplexity_and_answers(
    server: ServerProcess, tiny_folder: Path, tiny_chat: LoadedModel, tmp_path: Path
) -> None:
    """Each log probability is the model's own; answers come as well."""
    choices = [{"question": q, "choices": c, "answer": 0} for q, c in CHOICES]
    write_task(
        tmp_path,
        "tiny_choice",
        choices,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
    )
    write_task(
        tmp_path,
        "tiny_perplexity",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    write_task(
        tmp_path,
        "tiny_answer",
        [{"text": text} for text in TEXTS],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="door",
        generation_kwargs={"max_gen_toks": 5, "until": ["\n"]},
        metric_list=[{"metric": "exact_match"}],
    )
    model = f"model=x,base_url={server.url}/v1/completions,tokenizer={tiny_folder}"
    run(
        tmp_path,
        [
            *(program(LM_EVAL, "lm_eval"), "--model", "local-completions"),
            *("--model_args", f"{model},tokenized_requests=True,num_concurrent=1"),
            *("--include_path", tmp_path, "--tasks", "tiny_choice,tiny_perplexity,tiny_answer"),
            *("--log_samples", "--output_path", tmp_path / "out"),
        ],
    )
    encode = tiny_chat.tokenizer.encode
    for (question, words), told in zip(CHOICES, samples_of(tmp_path, "tiny_choice"), strict=True):
        own = [logprob_of(tiny_chat, encode(question), encode(word)) for word in words]
        assert [float(value) for value, _greedy in told] == pytest.approx(own, abs=1e-3)
    start = [tiny_chat.tokenizer.eos_token_id]
    for text, told in zip(TEXTS, samples_of(tmp_path, "tiny_perplexity"), strict=True):
        own = logprob_of(tiny_chat, start, encode(text))
        assert float(told[0]) == pytest.approx(own, abs=1e-3)
    assert all(len(told[0].split()) > 0 for told in samples_of(tmp_path, "tiny_answer"))


BENCH = [
    *("--num-prompts", "8", "--seed", "1"),
    *("--random-input-len", "48", "--random-output-len", "4"),
]


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_vllms_benchmark_finds_the_model_by_itself(
    server: ServerProcess, tmp_path: Path, backend: str
) -> None:
    """It asks for log probabilities, too; name and tokenizer are those of ``/v1/models``."""
    path = "/v1/completions" if backend == "openai" else "/v1/chat/completions"
    script = [program(VLLM), ROOT / "tests/engines/runners/bench_vllm.py"]
    flags = ["--backend", backend, "--endpoint", path, "--base-url", server.url, *BENCH]
    flags += ["--dataset-name", "random"]
    flags += ["--logprobs", "2"] if backend == "openai" else []
    run(tmp_path, [*script, *flags, "--save-result", "--result-filename", "found.json"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["completed"], found["failed"]) == (8, 0)
    assert found["total_output_tokens"] == 8 * 4


@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "vllm"])
def test_sglangs_benchmark_asks_in_each_form(
    server: ServerProcess, tiny_folder: Path, tmp_path: Path, backend: str
) -> None:
    flags = ["--backend", backend, "--base-url", server.url, "--flush-cache", *BENCH]
    # Its data set "random" is one that it downloads; the ratio 1 makes all lengths equal.
    flags += ["--dataset-name", "random-ids", "--random-range-ratio", "1"]
    flags += ["--model", str(tiny_folder), "--tokenizer", str(tiny_folder)]
    flags += ["--return-logprob", "--top-logprobs-num", "2"] if backend == "sglang" else []
    script = [program(SGLANG[0]), "-m", "sglang.benchmark.serving"]
    env = variables(SGLANG[0], alone(tmp_path))  # with what a CPU lacks
    run(tmp_path, [*script, *flags, "--output-file", tmp_path / "found.jsonl"], env)
    (found,) = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    assert found["completed"] == 8
    assert found["total_output_tokens"] == 8 * 4


TRACE = [[0, 1, 2], [0, 1, 3], [4, 5], [0, 1, 2, 6], [4, 5]]
"""The blocks of each request of a trace; the same number is the same text."""
BLOCK = 2 * PAGE


def cached_by_trace() -> int:
    """Tokens of the trace that a cache can have: whole pages, and never a prompt's last token."""
    known: set[tuple[int, ...]] = set()
    n_tokens = 0
    for blocks in TRACE:
        prefixes = [tuple(blocks[:n]) for n in range(1, len(blocks) + 1)]
        n_shared = sum(prefix in known for prefix in prefixes) * BLOCK
        n_tokens += min(n_shared, (len(blocks) * BLOCK - 1) // PAGE * PAGE)
        known.update(prefixes)
    return n_tokens


def write_trace(file: Path, apart: float) -> Path:
    """The trace in the form of Mooncake's, its requests ``apart`` in the unit of the reader."""
    lines = [
        {
            "timestamp": n * apart,
            "input_length": len(blocks) * BLOCK,
            "output_length": 4,
            "hash_ids": blocks,
        }
        for n, blocks in enumerate(TRACE)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def in_a_hub(model: Path, home: Path) -> str:
    """Puts a model into a hub's cache folder; its name there."""
    folder, commit = home / "hub/models--tiny--chat", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / commit).symlink_to(model)
    return "tiny/chat"


def aiperf(
    server: ServerProcess, model: Path, folder: Path, *flags: str | Path
) -> dict[str, float]:
    """Runs aiperf in ``folder``; the means of what it measured."""
    name = in_a_hub(model, folder / "hub")  # without a network it takes no path for a tokenizer
    command = [program(AIPERF, "aiperf"), "profile", "--model", name, "--tokenizer", name]
    command += ["--url", server.url, "--streaming", "--extra-inputs", "ignore_eos:true"]
    command += ["--ui", "none", "--random-seed", "1", "--artifact-dir", folder / "out"]
    run(folder, [*command, "--use-server-token-count", "--reset-kv-cache", *flags])
    found = json.loads((folder / "out/profile_export_aiperf.json").read_text())
    assert found["request_error_rate"]["avg"] == 0
    exported = json.loads((folder / "out/server_metrics_export.json").read_text())
    assert "hicache:cached_tokens" in exported["metrics"]
    measured = {name: each for name, each in found.items() if isinstance(each, dict)}
    return {name: each["avg"] for name, each in measured.items() if "avg" in each}


def cached_tokens(server: ServerProcess) -> float:
    """Of all requests so far, by the server's own count."""
    found = server.metrics()
    return sum(n for name, n in found.items() if name.startswith("cached_tokens_total"))


def test_aiperf_chats_and_is_told_what_was_cached(
    server: ServerProcess, tiny_folder: Path, tmp_path: Path
) -> None:
    before = cached_tokens(server)
    lengths = ("--isl", "32", "--osl", "4", "--num-dataset-entries", "4")
    load = ("--request-count", "8", "--concurrency", "2")
    found = aiperf(server, tiny_folder, tmp_path, "--endpoint-type", "chat", *lengths, *load)
    assert found["request_count"] == 8
    assert found["total_osl"] == 8 * 4
    assert found["total_usage_prompt_cache_read_tokens"] == cached_tokens(server) - before > 0


def test_aiperf_replays_a_trace_with_exactly_its_hits(
    server: ServerProcess, tiny_folder: Path, tmp_path: Path
) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", apart=300)  # ms
    kind = ("--custom-dataset-type", "mooncake_trace", "--isl-block-size", str(BLOCK))
    asked = ("--endpoint-type", "completions", "--input-file", trace, *kind)
    found = aiperf(server, tiny_folder, tmp_path, *asked)
    assert found["request_count"] == len(TRACE)
    assert found["total_usage_prompt_cache_read_tokens"] == cached_by_trace() == 104


@pytest.mark.parametrize("asks", ["chats", "trace"])
def test_guidellm_is_told_of_each_request_what_was_cached(
    server: ServerProcess, tiny_folder: Path, tmp_path: Path, asks: str
) -> None:
    """In chats of two turns behind a common prefix, and in a trace of Mooncake's form.

    It leaves out words that the tiny tokenizer does not know, so prompts are shorter than asked.
    """
    before, model = cached_tokens(server), str(tiny_folder)
    backend = {"kind": "openai_http", "target": server.url, "model": model}
    data: dict[str, Any]
    if asks == "chats":
        backend["request_format"] = "/v1/chat/completions"
        data = {"kind": "synthetic_text", "prompt_tokens": 16, "output_tokens": 4, "turns": 2}
        data |= {"prefix_count": 1, "prefix_tokens": 32}
        load = [
            "--profile",
            "kind=concurrent,streams=2",
            "--constraint",
            "kind=max_requests,count=8",
        ]
    else:
        backend["request_format"] = "/v1/completions"
        trace = write_trace(tmp_path / "trace.jsonl", apart=0.1)  # s
        data = {"kind": "mooncake", "source": {"kind": "json_file", "path": str(trace)}}
        data |= {"hash_id_block_size": BLOCK}
        load = ["--profile", "kind=replay"]
    tokenizer = {"kind": "hf_auto", "model": model}
    command = [program(GUIDELLM, "guidellm"), "run", "--backend", json.dumps(backend), *load]
    command += ["--tokenizer", json.dumps(tokenizer), "--data", json.dumps(data)]
    run(tmp_path, [*command, "--output", "kind=json,path=found.json", "--disable-console"])
    (found,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    requests = found["requests"]
    assert not requests["errored"]
    assert not requests["incomplete"]
    assert len(requests["successful"]) == (8 if asks == "chats" else len(TRACE))
    assert all(each["output_tokens"] == 4 for each in requests["successful"])
    told = sum(each["cached_tokens"] or 0 for each in requests["successful"])
    assert told == cached_tokens(server) - before > 0
