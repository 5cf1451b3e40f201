"""Jobs on models whose router sends some experts hardly a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from counterweight.pipeline.manifest import parse_manifest
from counterweight.pipeline.manifest.job import canonical
from tests.inprocess import RecordedProgress, local, run_job
from tests.models import checkpoint
from tests.workers.specs import Site

RECIPE: dict[str, Any] = {"weights": {"bits": 4, "group_size": 32}}


def ran(root: Path, experts: dict[str, Any] | None = None, **more: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Report and ledger of a job on eight sequences of 32 tokens, of which two of four experts see 128 each, and its id."""
    model = root / "model"
    if not model.exists():
        checkpoint("mixtral", model, torch.bfloat16)
    calibration = {} if experts is None else {"experts": experts}
    published = run_job(model, root / "out", RECIPE, calibration=calibration, **more)
    place = local(published)
    report, ledger = (json.loads((place / name).read_text()) for name in ("report/report.json", "ledger.json"))
    return report, ledger, published.document.id


def starved(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [m for m in report["modules"] if any(f["step"] == "experts.starved" for f in m["fallbacks"])]


def test_each_expert_below_its_floor_is_named_with_its_tokens(tmp_path: Path) -> None:
    progress = RecordedProgress()
    report, ledger, _ = ran(tmp_path, progress=progress)
    for module in report["modules"]:
        few = ".experts." in module["name"] and module["tokens"] < 2 * module["columns"]
        assert (module in starved(report)) == few
        assert module["held_out"]["quantized"] > 0
    assert starved(report)
    told = {module["name"]: module["fallbacks"][0]["cause"] for module in starved(report)}
    for module in starved(report):
        cause = told[module["name"]]
        assert cause.startswith(f"{module['tokens']} of {2 * module['columns']} tokens")
        assert "256 tokens of the layer" in cause
        (entry,) = [e for e in ledger["entries"] if f"{module['name']}.weight_packed" in e["stored_as"]]
        assert entry["reason"] == f"experts.starved: {cause}"
    assert sum(not e["reason"] for e in ledger["entries"] if e["fate"] == "quantized") == len(report["modules"]) - len(
        told
    )
    assert any("experts.starved" in note for note in progress.notes)


def test_a_floor_of_nothing_leaves_experts_with_their_own_tokens(tmp_path: Path) -> None:
    default, _, first = ran(tmp_path)
    plain, _, second = ran(tmp_path, {"floor": 0.0})
    assert starved(plain) == []
    assert first != second
    assert [m["tokens"] for m in plain["modules"]] == [m["tokens"] for m in default["modules"]]


def test_every_token_reaches_every_expert_for_calibration_only(tmp_path: Path) -> None:
    report, _, _ = ran(tmp_path, {"every_token": True}, workers=2)
    assert {module["tokens"] for module in report["modules"]} == {256}
    assert starved(report) == []


def test_workers_and_threads_change_no_bit(tmp_path: Path) -> None:
    checkpoint("mixtral", tmp_path / "model", torch.bfloat16)
    found = []
    for name, workers, threads in (("one", 1, 1), ("three", 3, 2)):
        calibration = {"sequences": 300, "experts": {"floor": 64.0, "sample": 2.0}}
        published = run_job(
            tmp_path / "model", tmp_path / name, RECIPE, calibration=calibration, workers=workers, threads=threads
        )
        found.append(json.loads((local(published) / "ledger.json").read_text()))
    assert any(entry["reason"].startswith("experts.starved") for entry in found[0]["entries"])
    assert found[0] == found[1]


def test_keys_of_dense_blocks_do_not_know_of_experts(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", torch.bfloat16)
    spec = Site(source=tmp_path / "model", work=tmp_path).block(0, ())
    assert spec.experts is None
    document = {
        "apiVersion": "counterweight/v1",
        "kind": "CompressionJob",
        "metadata": {"name": "a"},
        "spec": {
            "model": {"uri": "file:/a"},
            "calibration": {"source": {"uri": "file:/b"}, "experts": {}},
            "recipe": RECIPE,
            "output": {"uri": "file:/c"},
        },
    }
    asked = canonical(parse_manifest(json.dumps(document), name="a.json", base="file:/").job)
    assert b"experts" not in asked
    document["spec"]["calibration"]["experts"] = {"floor": 1}
    assert b"experts" in canonical(parse_manifest(json.dumps(document), name="a.json", base="file:/").job)
