"""A soak of seconds: every fault kind at once, no wrong byte, bounded requests, nothing left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hicache_core.testing.resources import Resources, settled
from tests.servers.process import n_claims
from tests.soak.report import as_json, as_markdown, write_section
from tests.soak.run import Plan, run
from tests.soak.samples import Growth, Sample, growth

SHORT = Plan(seconds=10.0, spell_s=0.3, sample_s=0.25, margin_s=20.0)
"""The margin is wide, since a test must not depend on how busy the machine is."""


def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    before, claimed_before = Resources.now(), n_claims()
    report = run(SHORT, tmp_path)
    # Ten seconds see few backends, which differ in descriptors: what is left at the end counts.
    assert [problem for problem in report.problems if " grew from " not in problem] == []
    assert set(report.faults) == {"corrupt", "flaky", "full", "slow", "stuck"}
    assert report.server
    assert any(event.startswith("attached") for event in report.events)
    n_claimed = n_claims() - claimed_before
    allowed = replace(before, n_descriptors=before.n_descriptors + n_claimed)
    after = settled(allowed, patience_s=10.0)
    assert after.n_threads <= allowed.n_threads
    assert after.n_descriptors <= allowed.n_descriptors
    page = tmp_path / "reliability.md"
    for _ in range(2):
        write_section(page, as_markdown(report))
    assert page.read_text().count("## Soak") == 1
    assert '"problems": []' in as_json(report)


def test_growth_compares_the_second_fifth_with_the_last() -> None:
    mib = 1 << 20
    flat = [Sample(n, 400 * mib if n else 10 * mib, 5, 20 + n % 3) for n in range(50)]
    assert not any(figure.grows for figure in growth(flat))
    leaking = [Sample(n, (400 + 2 * n) * mib, 5 + n, 20) for n in range(50)]
    assert [figure.name for figure in growth(leaking) if figure.grows] == [
        "resident_nbytes",
        "n_threads",
    ]
    assert growth(leaking)[1] == Growth("n_threads", 19.5, 49.5, 54.0, 8)
