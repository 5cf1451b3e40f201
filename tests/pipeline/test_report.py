from __future__ import annotations

import json
from math import exp
from pathlib import Path
from statistics import geometric_mean, mean

import pytest
import torch
from torch import Tensor

from counterweight.pipeline.artifact import ArtifactDocument
from counterweight.pipeline.artifact.report import Report, labelled, quality
from tests.models import read_tensors
from tests.pipeline.tiny import job_of, local_path, run_local, write_job

WINDOWS = [
    {"perplexity": 1.0, "kl": 0.5, "kl_p99": 4.0, "top1_agreement": 0.25},
    {"perplexity": 2.5, "kl": 0.0, "kl_p99": 1.0, "top1_agreement": 1.0},
    {"perplexity": 0.125, "kl": 0.25, "kl_p99": 1.0, "top1_agreement": 0.5},
]


def test_perplexity_is_the_geometric_mean_of_the_windows() -> None:
    found = quality(WINDOWS)
    assert found.perplexity == pytest.approx(geometric_mean([exp(w["perplexity"]) for w in WINDOWS]), rel=1e-12)
    assert found.kl == pytest.approx(mean(w["kl"] for w in WINDOWS))
    assert found.top1_agreement == pytest.approx(mean(w["top1_agreement"] for w in WINDOWS))


def test_what_compensation_is_called_says_which_figure_it_is() -> None:
    found = {name: quality(WINDOWS) for name in ("baseline", "quantized", "compensated")}
    assert list(labelled(found)) == ["original", "quantized", "compensated"]
    with_store = {"compensated_prefill": quality(WINDOWS[:1]), **found}
    assert list(labelled(with_store)) == ["original", "quantized", "compensated, decoding", "compensated, prefill"]
    assert labelled(with_store)["compensated, prefill"] == with_store["compensated_prefill"]


def test_documents_without_the_field_for_prefill_still_read(manifest: Path, tmp_path: Path) -> None:
    """As earlier revisions wrote them."""
    root = local_path(run_local(job_of(manifest, f"spec.output.uri={tmp_path}")).uri)
    for path, kind in (("artifact.json", ArtifactDocument), ("report/report.json", Report)):
        document = json.loads((root / path).read_text())
        assert document.pop("compensated_prefill") is None
        assert "compensated_prefill" not in kind.model_validate(document).qualities


def bits(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() * 8


def stored_bits(root: Path) -> tuple[dict[str, int], int, int]:
    """Kind of tensor -> bits, quantized weights, all weights; counted in the artifact's files by nothing of ours."""
    tensors = read_tensors(root)
    adapter = read_tensors(root / "compensation") if (root / "compensation").exists() else {}
    counts = {"packed": 0, "scale": 0, "zero_point": 0, "kept": 0, "factors": sum(map(bits, adapter.values()))}
    weights = kept = 0
    for name, tensor in tensors.items():
        kind = name.rsplit("weight_", 1)[1] if "weight_" in name else "kept"
        if kind == "shape":
            weights += int(tensor.prod())
            continue
        counts[kind] += bits(tensor)
        kept += tensor.numel() if kind == "kept" else 0
    return counts, weights, weights + kept


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=2)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["spec.recipe.compensation={kind: none}"],
        ["spec.recipe.weights={bits: 3, group_size: null}"],
        ["spec.recipe.weights.symmetric=false"],
        ["spec.recipe.overrides=[{match: '*.down_proj', weights: {bits: 8, group_size: null}}]"],
        ["spec.recipe.keep=[lm_head, '*.o_proj']"],
    ],
    ids=["4 bits, groups, rank 4", "no branch", "3 bits, channels", "asymmetric", "8 bits for some", "some kept"],
)
def test_bits_per_weight_are_those_of_the_stored_tensors(manifest: Path, tmp_path: Path, changes: list[str]) -> None:
    job = job_of(manifest, f"spec.output.uri={tmp_path}", "spec.validation=", *changes)
    published = run_local(job)
    counts, weights, parameters = stored_bits(local_path(published.uri))
    found = published.document.bits_per_weight
    # Widths are multiples of 32 here, so packed words have no unused bits.
    assert found.weights * weights == pytest.approx(counts["packed"], rel=1e-12)
    assert found.scales * weights == pytest.approx(counts["scale"] + counts["zero_point"], rel=1e-12)
    assert found.factors * weights == pytest.approx(counts["factors"], rel=1e-12)
    assert found.residual == 0.0
    assert found.total == pytest.approx(found.weights + found.scales + found.factors, rel=1e-12)
    assert found.model * parameters == pytest.approx(sum(counts.values()), rel=1e-12)


def test_the_report_has_what_the_contract_names(manifest: Path, tmp_path: Path) -> None:
    published = run_local(job_of(manifest, f"spec.output.uri={tmp_path}"))
    root = local_path(published.uri)
    report = Report.model_validate_json((root / "report" / "report.json").read_bytes())
    plain = json.loads((root / "report" / "report.json").read_text())
    assert plain["compensated_prefill"] is None
    for variant in ("baseline", "quantized", "compensated"):
        assert set(plain[variant]) == {"perplexity", "kl", "kl_p99", "kl_last_quarter", "top1_agreement"}
    assert [module.name for module in report.modules] == [
        f"model.layers.{index}.{name}"
        for index in range(2)
        for name in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    ]
    for module in report.modules:
        assert module.error_before is not None
        assert module.error_after is not None
        assert 0 < module.error_after < module.error_before < 1
        assert (module.rank, module.bits, module.tokens) == (4, 4, 12 * 32)
    assert [task.name for task in report.tasks] == [
        "block 0",
        "block 1",
        report.tasks[2].name,
        "validation of windows 0 to 6",
    ]
    assert report.tasks[2].name.startswith("original on sequences 0 to 6 of ")
    for task in report.tasks:
        assert task.timing.total > 0
        assert task.timing.host_peak_bytes > 1 << 20
    assert {"tokens", "inventory", "blocks", "assemble", "validate"} <= set(report.stages)
    assert all(seconds >= 0 for seconds in report.stages.values())
    assert report.model.digest == published.document.base_model.digest
    assert report.recipe["recipe"]["weights"]["bits"] == 4
    assert report.recipe["calibration"]["seed"] == 0
    assert (report.calibration.sequences, report.calibration.sequence_length) == (12, 32)
    assert set(report.software) >= {"counterweight", "torch", "transformers", "ray"}
    assert torch.__version__.startswith(report.software["torch"].split("+")[0])
    page = (root / "report" / "report.html").read_text()
    assert "tiny" in page


def test_a_report_says_which_blocks_were_reused(manifest: Path, tmp_path: Path) -> None:
    """The same blocks under another validation: another artifact, no block done again."""
    run_local(job_of(manifest, f"spec.output.uri={tmp_path}"))
    published = run_local(job_of(manifest, f"spec.output.uri={tmp_path}", "spec.validation.windows=3"))
    report = Report.model_validate_json((local_path(published.uri) / "report" / "report.json").read_bytes())
    assert [task.reused for task in report.tasks] == [True, True, False, False]
