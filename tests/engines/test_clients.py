"""Programs of others that ask the server: an evaluation, and benchmarks of serving."""

from __future__ import annotations

import json
import os
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
    with server_process(tiny_folder, [*flags, "--max-total-tokens", "16384"]) as process:
        yield process


def alone(folder: Path) -> dict[str, str]:
    """What a client finds in ``os.environ``: no network, and no package of this environment."""
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**kept, **own, "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}


def run(folder: Path, command: list[str | Path], env: Mapping[str, str] | None = None) -> str:
    """What a client says; it must succeed."""
    done = subprocess.run(
        list(map(str, command)),
        env=env or alone(folder),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


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
