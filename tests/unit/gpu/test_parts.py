"""The checks for a GPU, each as a dry run on the CPU: they go through, and find what is wrong."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.plan import NOT_MEASURED, PARTS, TOTAL_S
from benchmarks.gpu.report import Check, Finding, Left, Outcome, all_well, from_lines, write
from benchmarks.harness import Row
from hicache_core.copies.base import CopyLayers, Direction, PageIds
from hicache_core.copies.direct import DirectTransfer

pytest.importorskip("triton", reason="Triton is not installed; it comes with CUDA's torch")

FOUND = {
    "same_bytes": {Check: 24, Left: 1},
    "streams": {Check: 8, Left: 4},
    "bandwidth": {Row: 26, Left: 1},
    "overlap": {Row: 15, Left: 5},
    "ttft": {Row: 6, Check: 6},
    "trace": {Check: 2},
}
"""How many findings of which kind a dry run has."""


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """Triton reads the switch when the kernel is defined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("hicache_core.copies.triton_kernel")
        yield


def dry_run(name: str, folder: Path) -> list[Finding]:
    part = importlib.import_module("benchmarks.gpu.part")
    lines = folder / "lines"
    part.main(name, lines, folder, dry=True)
    with lines.open() as file:
        return from_lines(file)


@pytest.mark.parametrize("name", [part.name for part in PARTS])
def test_a_part_goes_through_on_a_cpu_and_everything_holds(name: str, tmp_path: Path) -> None:
    found = dry_run(name, tmp_path)
    counts = {kind: sum(isinstance(each, kind) for each in found) for kind in (Row, Check, Left)}
    assert counts == {Row: 0, Check: 0, Left: 0, **FOUND[name]}
    assert [each for each in found if isinstance(each, Check) and not each.held] == []
    rows = [each for each in found if isinstance(each, Row)]
    assert all(row.table.startswith("dry run on the CPU: ") for row in rows)


class LosesABit(DirectTransfer):
    """Right but for the first byte of the first page that is named."""

    def _prepare(
        self, direction: Direction, device_pages: PageIds, host_pages: PageIds
    ) -> CopyLayers:
        copy = super()._prepare(direction, device_pages, host_pages)

        def damaged(layers: range) -> None:
            copy(layers)
            on_device, on_host = self._rows[layers.start][0]
            if direction is Direction.TO_HOST:
                on_host[host_pages[0]].view(torch.uint8)[0, 0] ^= 1
            else:
                on_device[device_pages[0]].view(torch.uint8)[0, 0] ^= 1

        return damaged


@pytest.mark.parametrize("name", ["same_bytes", "streams"])
def test_a_copy_that_loses_a_bit_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.place.DirectTransfer", LosesABit)
    monkeypatch.setattr("benchmarks.gpu.same_bytes.specs", lambda place: {"a few": place.spec})
    checks = [each for each in dry_run(name, tmp_path) if isinstance(each, Check)]
    of_direct = [each for each in checks if each.rule.startswith("direct")]
    assert of_direct
    assert not any(each.held for each in of_direct)
    assert all(each.held for each in checks if each not in of_direct)


def test_an_answer_over_wrong_pages_is_found(tmp_path: Path) -> None:
    ttft = importlib.import_module("benchmarks.gpu.ttft")
    logits = torch.randn(512, generator=torch.Generator().manual_seed(0))
    cold = [ttft.Answer(1.0, 0, logits)]
    near = ttft.Answer(0.1, 24, logits + 0.01 * logits.flip(0))
    far = ttft.Answer(0.1, 24, logits.flip(0))
    computed = ttft.Answer(0.1, 0, logits)
    for answer, held in ((near, True), (far, False), (computed, False)):
        checks = ttft._same_answers(40, cold, {"host": [answer]})
        assert [check.held for check in checks] == [held]


def test_all_parts_together_end_within_six_minutes() -> None:
    assert sum(part.deadline_s for part in PARTS) <= TOTAL_S < 360


def test_a_report_names_what_did_not_hold_and_what_was_not_measured(tmp_path: Path) -> None:
    row = Row("copies", "up", "GB/s", [50.0])
    found = [Check("bytes are the same", held=False, note="page 3"), Left("far pages", "no room")]
    well = Outcome("streams", "well", 2.0, "", [row, *found])
    hung = Outcome("ttft", "out of time", 95.0, "Traceback", [])
    write(tmp_path, {"device": NOT_MEASURED}, [well, hung])
    page = (tmp_path / "gpu.md").read_text()
    assert f"**{NOT_MEASURED}**" in page
    assert "| streams | bytes are the same | **no** | page 3 |" in page
    assert "| ttft | out of time | 95.0 |" in page
    assert "Traceback" in page
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["run"] == {"device": NOT_MEASURED}
    assert [part["ended"] for part in written["parts"]] == ["well", "out of time"]
    assert written["parts"][0]["findings"][0]["samples"] == [50.0]
    assert not all_well([well])
    assert not all_well([hung])
    assert all_well([Outcome("streams", "well", 2.0, "", [row])])


def test_findings_of_a_part_that_was_ended_are_kept_but_for_a_line_cut_short(
    tmp_path: Path,
) -> None:
    report = importlib.import_module("benchmarks.gpu.report")
    check = Check("bytes are the same", held=True)
    lines = [report.to_line(check), report.to_line(check)[:20]]
    assert from_lines(lines) == [check]
