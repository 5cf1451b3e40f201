"""The model card: the hub's own reader understands it, its figures are the report's, and it says how the artifact loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from counterweight.pipeline.artifact.card import CARD, card, hub_id
from counterweight.pipeline.artifact.report import Report
from counterweight.workers.ledger import ADAPTER
from tests.pipeline.report_documents import report
from tests.pipeline.tiny import job_of, local_path, run_local, write_job


def made(uri: str = "hf:org/model-1@abc", files: tuple[str, ...] = (), *, stock: bool = True) -> ModelCard:
    whole = report()
    named = whole.model_copy(update={"model": whole.model.model_copy(update={"uri": uri})})
    return ModelCard(card(named, files, stock=stock))


def test_the_hub_reads_its_metadata() -> None:
    data = made(files=("config.json", "LICENSE", "license.txt")).data
    assert data.base_model == "org/model-1"
    assert data.license == "other"
    assert data.to_dict()["license_link"] == "LICENSE"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.library_name == "transformers"
    assert data.tags == ["counterweight", "compressed-tensors"]


@pytest.mark.parametrize("uri", ["file:///home/somebody/secret", "s3://bucket/key", "hf:a/b\nlicense: mit"])
def test_where_a_model_lies_that_is_on_no_hub_is_nobodys_affair(uri: str) -> None:
    made_of = made(uri)
    assert made_of.data.base_model is None
    assert uri not in made_of.content
    assert made_of.data.license is None


def test_it_says_how_the_artifact_loads() -> None:
    assert "as it is; so does Counterweight" in made().text
    with_branch = made(files=(ADAPTER,)).text
    assert 'from_pretrained(model, "path/of/this/folder", subfolder="compensation")' in with_branch
    own = made(stock=False).text
    assert "after `import counterweight.auto`" in own
    assert "refuse it" in own


def test_an_artifacts_card_has_its_figures(tmp_path: Path) -> None:
    root = local_path(run_local(job_of(write_job(tmp_path, layers=1))).uri)
    found = Report.model_validate_json((root / "report" / "report.json").read_bytes())
    text = (root / CARD).read_text()
    assert found.baseline is not None
    assert found.compensated is not None
    row = next(line for line in text.splitlines() if line.startswith("| perplexity"))
    assert row.split(" | ")[1] == f"{found.baseline.perplexity:.4f}"[: len(row.split(" | ")[1])]
    assert f"{found.bits_per_weight.total:.3f} bits per quantized weight" in text
    assert found.id in text
    assert str(tmp_path) not in text


def test_without_a_validation_it_claims_nothing(tmp_path: Path) -> None:
    root = local_path(run_local(job_of(write_job(tmp_path, layers=1), "spec.validation=")).uri)
    text = (root / CARD).read_text()
    assert "nothing was measured on text" in text
    assert "perplexity" not in text


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("hf:org/model-1@abc", "org/model-1"),
        ("hf://org/model", "org/model"),
        (
            "file:///home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/b968826d9c46dd6066d109eabc6255188de91218",
            "Qwen/Qwen3-8B",
        ),
        ("file:///hub/models--meta-llama--Llama-3.1-8B/snapshots/0/", "meta-llama/Llama-3.1-8B"),
        ("file:///home/me/models/Qwen3-8B", None),
        ("file:///hub/models--gpt2/snapshots/0", None),
    ],
)
def test_a_copy_in_the_hubs_cache_is_known_by_its_name(uri: str, name: str | None) -> None:
    assert hub_id(uri) == name
