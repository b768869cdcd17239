"""The benchmark of eviction policies: what it reads, and what it counts."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from benchmarks.eviction_traces import (
    EXCERPT,
    POLICIES,
    Cache,
    Trace,
    chats,
    documents,
    hit_rate,
    read_trace,
)

FIRST_LINES = """\
{"timestamp": 0, "input_length": 900, "output_length": 5, "hash_ids": [7, 8]}

{"timestamp": 3, "input_length": 1200, "output_length": 9, "hash_ids": [7, 8, 4000000000]}
"""


def test_a_trace_in_mooncakes_format_is_read_plain_or_packed(tmp_path: Path) -> None:
    """Of each line the block ids; empty lines are none."""
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text(FIRST_LINES)
    packed.write_bytes(gzip.compress(FIRST_LINES.encode()))
    assert read_trace(plain).prompts == [[7, 8], [7, 8, 4_000_000_000]]
    assert read_trace(packed).prompts == read_trace(plain).prompts
    assert read_trace(plain).n_distinct == 3


def test_the_excerpt_is_whole() -> None:
    """A thousand requests; no block comes twice in one, or behind two different prefixes."""
    trace = read_trace(EXCERPT)
    assert (len(trace.prompts), trace.n_distinct) == (1000, 10_037)
    before: dict[int, int] = {}
    for prompt in trace.prompts:
        assert len(set(prompt)) == len(prompt)
        for above, block in zip([-1, *prompt], prompt, strict=False):
            assert before.setdefault(block, above) == above


def test_generated_workloads_are_the_same_each_time() -> None:
    """Figures of two runs can be compared."""
    assert chats(100) == chats(100)
    assert documents(100) == documents(100)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_room_for_all_every_policy_serves_the_same(policy: str) -> None:
    """The first sight of a page is a miss, all others are hits."""
    trace = Trace("some", read_trace(EXCERPT).prompts[:150])
    n_asked = sum(map(len, trace.prompts))
    best = 100 * (n_asked - trace.n_distinct) / n_asked
    assert hit_rate(trace, policy, trace.n_distinct) == pytest.approx(best)
    assert 0 < hit_rate(trace, policy, trace.capacity(1)) < best


@pytest.mark.parametrize("policy", POLICIES)
def test_of_a_prompt_longer_than_the_cache_the_front_is_kept(policy: str) -> None:
    """Nothing is served that was not there, and the cache stays whole."""
    cache = Cache(policy, 3)
    assert cache.serve([1, 2, 3, 4, 5]) == 0
    assert cache.serve([1, 2, 3, 4, 5]) == 3
    assert cache.serve([6]) == 0
    assert cache.serve([1, 2, 3]) == 2
    cache.tree.check_integrity()
