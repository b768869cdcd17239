"""``hicache bench replay``: the forms of traces, and prompts that share what traces share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.bench.replay import Prompts
from hicache_core.bench.traces import TraceRequest, read_trace, scaled
from hicache_core.errors import ConfigError
from tests.unit.bench.fake_server import FakeServer, serving
from tests.unit.bench.test_bench import bench, measured


@pytest.fixture
def server() -> Iterator[tuple[FakeServer, str]]:
    with serving() as made:
        yield made


def written(path: Path, *items: Any) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def line(at: float, n: int, *ids: int, output: int = 512, **more: Any) -> dict[str, Any]:
    return {"timestamp": at, "input_length": n, "output_length": output, "hash_ids": ids} | more


def test_a_replay_sends_equal_blocks_for_equal_hash_ids(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    """Blocks of 512 become 16 words; the second request shares 2 blocks, the third none."""
    fake, url = server
    file = written(
        tmp_path / "trace.jsonl",
        line(0, 1024, 1, 2),
        line(300, 1536, 1, 2, 3),
        line(600, 512, 4),
    )
    arguments = ("replay", file, "--block-tokens", 16, "--time-scale", 0.1, "--max-parallel", 1)
    found = measured(tmp_path, url, *arguments)
    assert found["summary"]["prompt_tokens"] == 32 + 48 + 16
    assert found["summary"]["hit_tokens"]["device"] == 32
    assert [body["max_tokens"] for body in fake.bodies] == [16, 16, 16]
    sent = [one["sent_s"] for one in sorted(found["requests"], key=lambda one: one["client"])]
    assert sent[1] >= 0.03
    assert sent[2] >= 0.06


def test_a_trace_of_small_blocks_in_seconds_is_taken_as_such(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    """Five requests of 160 tokens, in Bailian's form, share their first block of 16."""
    _, url = server
    rows = [
        line(n, 160, 1, *(100 * n + k for k in range(9)), output=1, chat_id=n, parent_chat_id=-1)
        for n in range(1, 6)
    ]
    file = written(tmp_path / "trace.jsonl", *rows)
    assert [one.at_s for one in read_trace(file)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    found = measured(tmp_path, url, "replay", file, "--time-scale", 0, "--max-parallel", 1)
    assert found["summary"]["prompt_tokens"] == 800
    assert found["summary"]["hit_tokens"]["device"] == 64


def test_block_size_and_time_unit_may_be_said(tmp_path: Path) -> None:
    file = written(tmp_path / "trace.jsonl", line(1.5, 100, 1, 2))
    (request,) = read_trace(file, block_tokens=64, time_unit="s")
    assert (request.at_s, request.block_tokens) == (1.5, 64)


def test_a_conversation_of_kv_cache_tester_is_a_session(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    """Ids name whole blocks: of 70 tokens 64 have one, and 6 are the request's own."""
    fake, url = server
    requests = [
        {"t": 0.0, "type": "n", "in": 70, "out": 3, "hash_ids": [1]},
        {"t": 0.1, "type": "n", "in": 130, "out": 3, "hash_ids": [1, 2]},
        {"requests": [{"t": 0.05, "in": 64, "out": 3, "hash_ids": [1]}], "type": "subagent"},
    ]
    first = {"id": "one", "block_size": 64, "requests": requests}
    file = written(tmp_path / "trace.json", first, first | {"id": "two", "requests": requests[:1]})
    found = read_trace(file)
    assert [(one.session, one.at_s) for one in found] == [
        ("one", 0.0),
        ("two", 0.0),
        ("one/2", 0.05),
        ("one", 0.1),
    ]
    assert found[0].blocks == ("one/1", "one/rest/0")
    assert found[1].blocks == ("two/1", "two/rest/0")  # ids are valid inside a conversation
    arguments = ("replay", file, "--time-scale", 0, "--max-parallel", 1)
    result = measured(tmp_path, url, *arguments)["summary"]
    assert result["prompt_tokens"] == 70 + 70 + 64 + 130
    assert result["hit_tokens"]["device"] == 64 + 64
    assert {body["max_tokens"] for body in fake.bodies} == {3}


def test_requests_of_one_session_wait_for_each_other(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    fake, url = server
    requests = [{"t": 0, "in": 8, "out": 1, "hash_ids": [n]} for n in range(6)]
    file = written(tmp_path / "one.json", {"id": "a", "block_size": 8, "requests": requests})
    measured(tmp_path, url, "replay", file, "--time-scale", 0)
    assert fake.most_running == 1


def test_conversations_of_sharegpt_are_sent_as_they_stand(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    fake, url = server
    turns = [("human", "one two"), ("gpt", "three"), ("human", "four"), ("gpt", "five six")]
    chat = [{"id": "x", "conversations": [{"from": who, "value": said} for who, said in turns]}]
    file = tmp_path / "chats.json"
    file.write_text(json.dumps(chat))
    measured(tmp_path, url, "replay", file)
    sent = [(body["prompt"].split(), body["max_tokens"]) for body in fake.bodies]
    assert sent == [(["one", "two"], 1), (["one", "two", "three", "four"], 2)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no requests"),
        ("{}", "object 1: unknown trace format with the fields none;"),
        ('{"a": 1}\n{"b": 2}', "line 1: unknown trace format with the fields a;"),
        ("[1]", "object 1: expected a JSON object, found 1"),
        ("{", "line 1: not valid JSON"),
        ('{"hash_ids": [1]}', r"a field is missing or wrong: KeyError\('timestamp'\)"),
        (json.dumps(line(0, 513, 1)), "513 tokens do not fit 1 blocks of 512"),
        (json.dumps(line(0, 512, 1, 2)), "512 tokens do not fit 2 blocks of 512.*tokens 256"),
        (
            json.dumps(line(0, 160, *range(10))),
            "if its blocks have 16 tokens, give --trace-block-tokens 16",
        ),
        (json.dumps(line(0.5, 5, 1)), "timestamp 0.5 is not a whole number of milliseconds"),
        (
            json.dumps(line(5, 5, 1)) + "\n" + json.dumps(line(4, 5, 1)),
            "not sorted by its timestamps",
        ),
        (
            '{"block_size": 64, "requests": [{"t": 0, "in": 63, "out": 1, "hash_ids": [1]}]}',
            "request 1: 63 tokens do not fit 1 whole blocks of 64",
        ),
    ],
)
def test_a_trace_that_is_wrong_is_a_clear_error(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_trace(file)


@given(
    prompts=st.lists(st.lists(st.integers(0, 200), min_size=1, max_size=5), min_size=2, max_size=4),
    block=st.integers(2, 16),
)
def test_prompts_share_exactly_the_blocks_that_traces_share(
    prompts: list[list[int]], block: int
) -> None:
    """However small the blocks: two digits of 89 words tell 200 blocks apart."""
    requests = [
        scaled(TraceRequest(0.0, 512 * len(ids), 1, tuple(map(str, ids)), 512), block)
        for ids in prompts
    ]
    made = Prompts(requests)
    texts = [made.text(request).split() for request in requests]
    for ids, text in zip(prompts, texts, strict=True):
        assert len(text) == block * len(ids)
        for others, other in zip(prompts, texts, strict=True):
            pairs = enumerate(zip(ids, others, strict=False))
            n_shared = next((n for n, (a, b) in pairs if a != b), min(len(ids), len(others)))
            assert text[: n_shared * block] == other[: n_shared * block]
            following = slice(n_shared * block, (n_shared + 1) * block)
            assert text[following] != other[following] or text == other


def test_blocks_too_short_to_tell_apart_are_refused(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    fake, url = server
    file = written(tmp_path / "trace.jsonl", *(line(n, 512, n) for n in range(100)))
    shown = bench("replay", file, "--url", url, "--block-tokens", 1)
    assert isinstance(shown.exception, ConfigError)
    assert "--block-tokens must be at least 2" in str(shown.exception)
    assert fake.bodies == []
