"""Every causal language model of transformers is identical with a cache, or refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.models.architectures import ARCHITECTURES, cases_of
from tests.models.findings import Finding, Verdict
from tests.models.page import PAGE, architectures_with, rows_of, with_tables
from tests.models.sweep import sweep

REPRESENTATIVES = (
    "bart",  # accepted, but not batched
    "bert",  # an encoder, which needs another setting
    "deepseek_v3",  # keys and values of different widths
    "deepseek_v32",  # an indexer
    "falcon_h1",  # state and attention in one layer
    "gemma3n_text",  # windows, and layers that share KV
    "gemma4_text",  # heads of two sizes
    "llama",
    "mistral",  # windows only
    "qwen3_next",  # state
    "rwkv",  # a state in no cache of transformers
)

LEAST_IDENTICAL = 155
"""Architectures that must be identical in ``CachedModel``, with hits from all three tiers."""

REGENERATE = "`python -m tests.models` writes docs/models.md"


def check(findings: Sequence[Finding]) -> None:
    """Nothing is wrong or crashes, advice helps, and what is identical could have failed."""
    bad = {
        name: outcome.reason
        for finding in findings
        for name, outcome in finding.outcomes()
        if outcome.verdict in (Verdict.WRONG, Verdict.CRASHED, Verdict.MISSED)
    }
    assert bad == {}
    advised = [finding for finding in findings if finding.advice]
    useless = [
        str(finding.final.case)
        for finding in advised
        if finding.final.adapter.verdict is not Verdict.IDENTICAL
    ]
    assert useless == [], "the setting that a refusal names does not help"
    blind = [
        str(finding.case)
        for finding in findings
        if finding.adapter.verdict is Verdict.IDENTICAL and not finding.can_fail
    ]
    assert blind == []


def test_a_model_of_each_kind_is_identical_or_refused_as_the_page_says() -> None:
    findings = list(sweep(next(cases_of(name)) for name in REPRESENTATIVES))
    check(findings)
    told = PAGE.read_text().splitlines()
    assert [row for row in rows_of(findings) if row not in told] == [], REGENERATE


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_all_models_are_identical_or_refused_as_the_page_says() -> None:
    findings = list(sweep(case for name in ARCHITECTURES for case in cases_of(name)))
    check(findings)
    identical = architectures_with(findings, Verdict.IDENTICAL, lambda finding: finding.adapter)
    assert len(identical) >= LEAST_IDENTICAL
    page = PAGE.read_text()
    assert with_tables(page, findings) == page, REGENERATE
