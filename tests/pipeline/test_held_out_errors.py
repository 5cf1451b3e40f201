"""Jobs whose errors are measured on windows that nothing was solved on, and those that have none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight.pipeline.artifact.report import Report
from counterweight.pipeline.artifact.report_html import render
from counterweight.pipeline.manifest import Calibration
from counterweight.workers.errors import RequestError
from tests.inprocess import local, run_job
from tests.models import checkpoint, read_tensors

RECIPE: dict[str, Any] = {
    "weights": {"bits": 3, "group_size": 32},
    "compensation": {"kind": "svd", "rank": {"count": 4}},
}


def ran(root: Path, name: str = "out", **calibration: Any) -> tuple[Report, Path]:
    if not (root / "model").exists():
        checkpoint("llama", root / "model", torch.bfloat16)
    place = local(run_job(root / "model", root / name, RECIPE, calibration=calibration))
    return Report.model_validate_json((place / "report" / "report.json").read_text()), place


@pytest.mark.parametrize(
    ("sequences", "length", "windows"), [(128, 2048, 2), (128, 256, 8), (8, 32, 1), (512, 2048, 2), (512, 16384, 1)]
)
def test_one_window_for_sixteen_is_held_out_of_4096_tokens_in_all(sequences: int, length: int, windows: int) -> None:
    asked = {"source": {"kind": "text", "uri": "file:/a"}, "sequences": sequences, "sequence_length": length}
    assert Calibration.model_validate(asked).held_out_sequences == windows
    assert Calibration.model_validate({**asked, "held_out": 7}).held_out_sequences == 7
    written = Calibration.model_validate({**asked, "source": {"kind": "model"}})
    assert written.held_out_sequences == 0
    with pytest.raises(ValueError, match="held_out: 7: expected null or 0 where the model writes its own"):
        Calibration.model_validate({**asked, "source": {"kind": "model"}, "held_out": 7})


def test_they_change_nothing_but_what_is_reported(tmp_path: Path) -> None:
    default, place = ran(tmp_path)
    none, plain = ran(tmp_path, held_out=0)
    assert (default.calibration.held_out, none.calibration.held_out) == (1, 0)
    assert default.id != none.id
    for folder in ("", "compensation"):
        found, expected = read_tensors(place / folder), read_tensors(plain / folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    for one, other in zip(default.modules, none.modules, strict=True):
        assert one.held_out is not None
        assert one.held_out.tokens == 32
        assert other.held_out is None
        assert one.error_compensated is None
        assert other.error_compensated is not None
        assert one.error_after == one.held_out.compensated
        assert other.error_after == other.error_compensated


def test_the_page_says_which_tokens_errors_are_of(tmp_path: Path) -> None:
    judged, _ = ran(tmp_path)
    page = render(judged)
    assert "Measured on 1 window that nothing was solved on." in page
    assert "8 windows of 32 tokens: 256 in all; 1 further window held out" in page
    assert ">32 held out<" in page
    assert "n-sample" not in page
    page = render(ran(tmp_path, held_out=0)[0])
    assert "In-sample: measured on the tokens that layers were solved on" in page
    assert set(re.findall(r">(\d+ held out|in-sample)<", page)) == {"in-sample"}
    assert page.count(">in-sample<") % len(judged.modules) == 0  # once in each order of the table


def test_as_many_as_the_text_has_where_no_number_is_named(tmp_path: Path) -> None:
    """The tests' text has 20,000 tokens: 625 windows."""
    assert ran(tmp_path, sequences=624, sampling="consecutive")[0].calibration.held_out == 1
    report, _ = ran(tmp_path, sequences=625, sampling="consecutive")
    assert report.calibration.held_out == 0
    assert all(module.held_out is None for module in report.modules)
    with pytest.raises(RequestError, match=r"^spec\.calibration\.held_out: 2: the source has 1 windows beside"):
        ran(tmp_path, sequences=624, held_out=2, sampling="consecutive")


def test_workers_and_blocks_that_see_compressed_ones_change_nothing_of_it(tmp_path: Path) -> None:
    checkpoint("mixtral", tmp_path / "model", torch.bfloat16)
    for propagate in ("original", "compressed"):
        found = []
        for workers, threads in ((1, 1), (3, 2)):
            calibration = {"sequences": 600, "held_out": 20, "sampling": "consecutive", "propagate": propagate}
            out = tmp_path / f"{propagate}{workers}"
            place = local(
                run_job(tmp_path / "model", out, RECIPE, calibration=calibration, workers=workers, threads=threads)
            )
            report = json.loads((place / "report" / "report.json").read_text())
            found.append([module["held_out"] for module in report["modules"]])
        assert found[0] == found[1]
        assert all(held_out["compensated"] < 0.5 for held_out in found[0])
