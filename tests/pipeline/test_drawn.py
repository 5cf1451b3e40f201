"""Jobs that draw windows for experts which see too few tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight.pipeline.artifact.report import Report
from counterweight.pipeline.artifact.report_html import render
from counterweight.pipeline.manifest import Calibration, parse_manifest
from counterweight.pipeline.manifest.job import canonical
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.plan import make_plan
from counterweight.pipeline.tokens import Tokens, read_tokens
from counterweight.workers.errors import ManifestError, RequestError
from tests.inprocess import local, run_job
from tests.models import checkpoint
from tests.pipeline.tiny import job_of, write_job

RECIPE: dict[str, Any] = {"weights": {"bits": 4, "group_size": 32}}
ASKED: dict[str, Any] = {"source": {"kind": "text", "uri": "file:/a"}, "sequences": 8, "sequence_length": 32}


def ran(root: Path, name: str = "out", workers: int = 1, threads: int = 1, **calibration: Any) -> Path:
    if not (root / "model").exists():
        checkpoint("mixtral", root / "model", torch.bfloat16)
    asked = {"sampling": "consecutive", "held_out": 2, **calibration}
    return local(run_job(root / "model", root / name, RECIPE, calibration=asked, workers=workers, threads=threads))


def report_of(place: Path) -> Report:
    return Report.model_validate_json((place / "report" / "report.json").read_text())


def test_workers_threads_and_stretches_change_no_bit(tmp_path: Path) -> None:
    """Two shards are drawn, behind one that is solved on: each is a stretch of its own where there are several workers."""
    found = []
    for workers, threads in ((1, 1), (3, 2)):
        place = ran(tmp_path, f"out{workers}", workers, threads, sequences=8, drawn=260)
        report = report_of(place)
        assert report.calibration.drawn == 260
        ledger = json.loads((place / "ledger.json").read_text())
        found.append((ledger, [module.model_copy(update={"seconds": 0.0}) for module in report.modules]))
    assert any(module.drawn for module in found[0][1])
    assert found[0] == found[1]


def test_report_and_ledger_say_what_was_drawn(tmp_path: Path) -> None:
    plain, place = report_of(ran(tmp_path, "plain")), ran(tmp_path, drawn=6)
    report = report_of(place)
    assert (plain.calibration.drawn, report.calibration.drawn) == (0, 6)
    assert plain.id != report.id
    assert "8 windows of 32 tokens: 256 in all; 6 further windows drawn for experts that saw too few" in render(report)
    entries = json.loads((place / "ledger.json").read_text())["entries"]
    fed = 0
    for one, other in zip(report.modules, plain.modules, strict=True):
        assert one.tokens == other.tokens + one.drawn
        assert bool(one.drawn) <= (".experts." in one.name and other.tokens < 2 * other.columns)
        if one.fallbacks:
            (entry,) = [entry for entry in entries if f"{one.name}.weight_packed" in entry["stored_as"]]
            told = f"{one.tokens} of {2 * one.columns} tokens, {one.drawn} of them from drawn sequences: "
            assert entry["reason"] == f"experts.starved: {one.fallbacks[0].cause}"
            assert one.fallbacks[0].cause.startswith(told)
        fed += bool(one.drawn)
        held_out = (one.held_out, other.held_out)
        assert all(each is not None for each in held_out)
    assert fed


def tokens_of(manifest: Path, **calibration: Any) -> Tokens:
    overrides = [f"spec.calibration.{name}={value}" for name, value in calibration.items()]
    return read_tokens(job_of(manifest, *overrides), open_model((manifest.parent / "model").as_uri()).tokenizer())


@pytest.mark.parametrize("sampling", ["random", "consecutive"])
def test_held_out_windows_are_the_same_whatever_is_drawn_and_no_token_is_in_both(sampling: str, tmp_path: Path) -> None:
    manifest = write_job(tmp_path, case="mixtral", layers=1)
    plain, drawn = (tokens_of(manifest, sequences=2, sampling=sampling, held_out=3, drawn=count) for count in (0, 5))
    assert plain.drawn is None
    assert drawn.drawn is not None
    assert drawn.drawn.sequences == 5
    assert plain.unseen is not None
    assert drawn.unseen is not None
    assert torch.equal(plain.unseen.ids, drawn.unseen.ids)
    assert torch.equal(plain.calibration.ids, drawn.calibration.ids)
    windows = {tuple(window) for each in (drawn.calibration, drawn.unseen) for window in each.ids.tolist()}
    assert windows.isdisjoint(map(tuple, drawn.drawn.ids.tolist()))


def test_a_source_with_too_few_windows_is_refused(tmp_path: Path) -> None:
    """The tests' text has 20,000 tokens: 625 windows."""
    message = r"^spec\.calibration\.drawn: 20: the source has 15 windows beside 608 that are solved on and 2 that are"
    with pytest.raises(RequestError, match=message):
        ran(tmp_path, sequences=608, drawn=20)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": {"kind": "model"}}, "drawn: 4: expected 0 where the model writes its own tokens"),
        ({"experts": {"floor": 0.0}}, "drawn: 4: expected 0 with experts.floor 0 or experts.every_token"),
        ({"experts": {"every_token": True}}, "drawn: 4: expected 0 with experts.floor 0 or experts.every_token"),
    ],
)
def test_where_no_window_can_be_drawn_or_nobody_asks_for_one_it_is_refused(wrong: Any, message: str) -> None:
    Calibration.model_validate({**ASKED, **wrong})
    with pytest.raises(ValueError, match=message):
        Calibration.model_validate({**ASKED, **wrong, "drawn": 4})


@pytest.mark.parametrize(("case", "keep"), [("llama", "[lm_head]"), ("mixtral", "[lm_head, '*.experts.*']")])
def test_a_recipe_that_compresses_no_expert_is_refused(case: str, keep: str, tmp_path: Path) -> None:
    manifest = write_job(tmp_path, case=case, layers=1)
    source, asked = open_model((tmp_path / "model").as_uri()), f"spec.recipe.keep={keep}"
    make_plan(job_of(manifest, asked), source)
    with pytest.raises(
        ManifestError, match=r"spec\.calibration\.drawn: 4: expected 0: the recipe compresses no expert"
    ):
        make_plan(job_of(manifest, asked, "spec.calibration.drawn=4"), source)


def test_jobs_that_draw_nothing_are_the_jobs_that_they_were() -> None:
    document: dict[str, Any] = {
        "apiVersion": "counterweight/v1",
        "kind": "CompressionJob",
        "metadata": {"name": "a"},
        "spec": {
            "model": {"uri": "file:/a"},
            "calibration": {**ASKED, "drawn": 0},
            "recipe": RECIPE,
            "output": {"uri": "file:/c"},
        },
    }
    assert b"drawn" not in canonical(parse_manifest(json.dumps(document), name="a.json", base="file:/").job)
    document["spec"]["calibration"]["drawn"] = 4
    assert b"drawn" in canonical(parse_manifest(json.dumps(document), name="a.json", base="file:/").job)


def test_the_plan_counts_drawn_windows(tmp_path: Path) -> None:
    """Forward passes of all; products of experts that see too few on average; storage of hidden states; seconds."""
    manifest = write_job(tmp_path, case="mixtral", layers=1)
    source = open_model((tmp_path / "model").as_uri())

    def planned(*overrides: str) -> Any:
        gpus = "spec.resources={workers: 2, gpus_per_worker: 1}"
        job = job_of(manifest, gpus, "spec.validation=", "spec.calibration.held_out=0", *overrides)
        return make_plan(job, source, "H100-80G")

    few, enough = "spec.calibration.experts.floor=16", "spec.calibration.experts.floor=0.1"
    plain, drawn = planned(few), planned(few, "spec.calibration.drawn=24")
    assert (plain.tokens, plain.drawn_tokens, drawn.tokens, drawn.drawn_tokens) == (12 * 32, 0, 12 * 32, 24 * 32)
    # The embedding's; behind the block they stay in the workers' memory.
    assert drawn.storage_written_bytes - plain.storage_written_bytes == 24 * 32 * 64 * 4
    assert drawn.blocks[0].statistics_flops > plain.blocks[0].statistics_flops
    assert drawn.estimate.seconds > plain.estimate.seconds
    fed, unfed = (planned(enough, *more).blocks[0] for more in (("spec.calibration.drawn=24",), ()))
    assert fed.statistics_flops == unfed.statistics_flops
    assert fed.forward_flops == 3 * unfed.forward_flops
