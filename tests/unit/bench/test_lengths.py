"""Traces of lengths, and of the benchmarks of SGLang and vLLM: formats and prefixes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.bench.lengths import BLOCK_TOKENS, Lengths, Sharing, blocks_for
from hicache_core.bench.replay import Prompts
from hicache_core.bench.traces import OUTPUT_TOKENS, TraceRequest, read_trace
from hicache_core.errors import ConfigError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:46.6805900,879,55
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,0,1087,API log
"""


def shown(requests: Sequence[TraceRequest]) -> list[tuple[int, int]]:
    return [(one.input_length, one.output_length) for one in requests]


def test_azures_csv_has_dates(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE)
    found = read_trace(file)
    assert shown(found) == [(374, 44), (396, 109), (879, 55)]
    times = [one.at_s - found[0].at_s for one in found]
    assert times == pytest.approx([0.0, 4.314579, 60.0], abs=1e-5)
    assert len(found[0].blocks) == -(-374 // BLOCK_TOKENS)


def test_burstgpts_csv_has_seconds_and_failures_count_as_one_token(tmp_path: Path) -> None:
    file = tmp_path / "BurstGPT.CSV"
    file.write_text(BURST)
    found = read_trace(file)
    assert [one.at_s for one in found] == [5.0, 45.5]
    assert shown(found) == [(472, 18), (1087, 1)]
    assert shown(read_trace(file, 1)) == [(472, 18)]


def test_a_csv_trace_can_be_replayed(tmp_path: Path) -> None:
    """Its prompts share as many words as their blocks say."""
    file = tmp_path / "azure.csv"
    file.write_text(AZURE)
    found = read_trace(file, sharing=Sharing(continues=0.0, system_prompts=1, system_tokens=160))
    texts = [Prompts(found).text(one).split() for one in found]
    assert [len(text) for text in texts] == [374, 396, 879]
    assert texts[0][:160] == texts[1][:160] == texts[2][:160]
    assert texts[0][160:176] != texts[1][160:176]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the columns none"),
        ("a,b\n1,2\n", "has the columns a, b; a trace of lengths has TIMESTAMP"),
        ("Timestamp,Request tokens,Response tokens\n", "has no requests"),
        ("Timestamp,Request tokens,Response tokens\n1,x,2\n", "line 2: could not convert"),
        ("Timestamp,Request tokens,Response tokens\nnow,1,2\n", "line 2: Invalid isoformat"),
        ("Timestamp,Request tokens,Response tokens\n1,2\n", "line 2: could not convert"),
        ("Timestamp,Request tokens,Response tokens\n2,2,2\n1,2,2\n", "not sorted"),
    ],
)
def test_a_csv_that_is_wrong_is_a_clear_error(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_trace(file)


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    continues=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_generated_prefixes_are_those_of_earlier_prompts_or_of_a_system_prompt(
    lengths: list[int], continues: float, seed: int
) -> None:
    rows = [Lengths(float(n), n_input, 1) for n, n_input in enumerate(lengths)]
    sharing = Sharing(continues, system_prompts=3, system_tokens=64, seed=seed)
    made = list(blocks_for(rows, sharing))
    assert made == list(blocks_for(rows, sharing))
    seen: set[tuple[str, ...]] = set()
    for row, blocks in zip(rows, made, strict=True):
        assert len(blocks) == -(-row.n_input // BLOCK_TOKENS)
        assert len(set(blocks)) == len(blocks)
        own = [n for n, name in enumerate(blocks) if blocks[: n + 1] not in seen]
        system = [n for n, name in enumerate(blocks) if name.startswith("system/")]
        assert system == list(range(len(system)))
        assert own == list(range(len(blocks) - len(own), len(blocks)))
        seen.update(blocks[: n + 1] for n in range(len(blocks)))


def test_more_prompts_continue_others_if_they_are_to() -> None:
    rows = [Lengths(float(n), 100 + 13 * (n * 7919 % 97), 1) for n in range(500)]

    def n_shared(continues: float) -> int:
        seen: set[tuple[str, ...]] = set()
        n = 0
        for blocks in blocks_for(rows, Sharing(continues, system_tokens=32)):
            n += sum(blocks[: k + 1] in seen for k in range(len(blocks)))
            seen.update(blocks[: k + 1] for k in range(len(blocks)))
        return n

    assert n_shared(0.0) < n_shared(0.4) < n_shared(0.9)


@pytest.mark.parametrize("values", [{"continues": 1.5}, {"system_prompts": 0}])
def test_sharing_out_of_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sharing(**values)  # type: ignore[arg-type]


def lines(path: Path, *items: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_sglangs_custom_dataset_is_question_and_answer(tmp_path: Path) -> None:
    pair = [{"content": "what is it"}, {"content": "a cache"}]
    file = lines(tmp_path / "custom.jsonl", {"conversations": pair}, {"conversations": []})
    (request,) = read_trace(file)
    assert (request.text.split(), request.output_length) == (["what", "is", "it"], 2)


def test_vllms_conversations_are_sessions_of_messages(tmp_path: Path) -> None:
    """A list that ends with a question has an answer of unknown length."""
    parts = [{"type": "text", "text": "two"}, {"type": "image_url", "image_url": {}}]
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "yes of course"},
        {"role": "user", "content": parts},
    ]
    file = tmp_path / "chats.json"
    file.write_text(json.dumps([{"id": "a", "messages": messages}]))
    found = read_trace(file)
    assert shown(found) == [(3, 3), (7, OUTPUT_TOKENS)]
    assert found[0].session == found[1].session
    file.write_text(json.dumps([{"messages": messages, "max_tokens": 7}]))
    assert read_trace(file)[1].output_length == 7


def test_vllms_custom_dataset_has_prompts(tmp_path: Path) -> None:
    file = lines(tmp_path / "c.jsonl", {"prompt": "a b c", "output_tokens": 9}, {"prompt": "a b"})
    found = read_trace(file)
    assert shown(found) == [(3, 9), (2, OUTPUT_TOKENS)]
    assert [one.session for one in found] == ["", ""]


def test_results_of_a_benchmark_are_lengths(tmp_path: Path) -> None:
    """As ``--output-details`` of SGLang and ``--save-detailed`` of vLLM write them."""
    runs = [
        {"input_lens": [40, 50], "output_lens": [5, 0]},
        {"input_lens": [60], "output_lens": [7]},
    ]
    found = read_trace(lines(tmp_path / "runs.jsonl", *runs))
    assert shown(found) == [(40, 5), (50, 1), (60, 7)]
    assert all(one.blocks for one in found)
    file = lines(tmp_path / "bad.jsonl", {"input_lens": [1, 2], "output_lens": [1]})
    with pytest.raises(ConfigError, match="a field is missing or wrong"):
        read_trace(file)


LINE = '{{"timestamp": {at}, "input_length": {n}, "output_length": {n_out}, "hash_ids": [{ids}]}}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LINE.format(at=0, n=-5, n_out=1, ids="1"), "-5 tokens do not fit 1 blocks of 512"),
        (LINE.format(at=0, n="1e30", n_out=1, ids="1,2"), "tokens do not fit 2 blocks of 512"),
        (LINE.format(at=0, n=5, n_out=-1, ids="1"), "an answer has from 0 to 100,000,000 tokens"),
        (LINE.format(at=0, n=5, n_out=10**11, ids="1"), "tokens, not 100,000,000,000"),
        (LINE.format(at=0, n="Infinity", n_out=1, ids="1"), "a field is missing or wrong"),
        (LINE.format(at="NaN", n=5, n_out=1, ids="1"), "object 1: timestamp nan is not a whole"),
        ('{"input_lens": [100000001], "output_lens": [1]}', "tokens, not 100,000,001"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_numbers_that_no_request_has_are_a_clear_error(
    tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read_trace(file)
    assert "ConfigError" not in str(caught.value)


@pytest.mark.parametrize("row", ["nan,5,5", "1e400,5,5", "1,-5,5", "1,5,-5", "1,inf,5", "1,5,1e30"])
def test_numbers_in_a_csv_are_checked(tmp_path: Path, row: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{row}\n")
    with pytest.raises(ConfigError, match=r"trace\.csv, line 2: "):
        read_trace(file)


def test_a_byte_order_mark_and_windows_ends_of_lines_do_not_matter(tmp_path: Path) -> None:
    line = LINE.format(at=0, n=5, n_out=7, ids="1")
    for name, text in (("a.csv", AZURE), ("b.jsonl", f"{line}\n{line}\n")):
        plain, marked = tmp_path / name, tmp_path / f"marked-{name}"
        plain.write_text(text)
        marked.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert read_trace(marked) == read_trace(plain)
