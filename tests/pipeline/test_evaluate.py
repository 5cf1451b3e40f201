from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight.pipeline.artifact import pull
from counterweight.pipeline.artifact.report import Quality
from counterweight.pipeline.evaluate import evaluate_artifact
from counterweight.pipeline.judging.wanted import Wanted
from counterweight.workers.errors import RequestError
from tests.models import checkpoint, write_text
from tests.pipeline.tiny import LocalPool, job_of, local_path, run_local, write_job


def evaluated(uri: str, **wanted: Any) -> dict[str, Quality]:
    """The figures of the first text."""
    return evaluate_artifact(uri, Wanted(**wanted))["text"].qualities


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=2)


@pytest.fixture(scope="module")
def uri(manifest: Path) -> str:
    """An artifact that three workers validated."""
    return run_local(job_of(manifest), LocalPool(3)).uri


def test_the_reports_figures_come_out_again_to_the_last_bit(uri: str, tmp_path: Path) -> None:
    document = pull(uri, tmp_path / "pulled")
    assert evaluated(uri) == document.qualities
    assert evaluated((tmp_path / "pulled").as_uri()) == document.qualities
    assert set(document.qualities) == {"baseline", "quantized", "compensated"}


def test_with_a_residual_store_the_model_in_prefill_is_a_figure_of_its_own(manifest: Path, tmp_path: Path) -> None:
    store = ["spec.recipe.weights.bits=3", "spec.recipe.residual={channels_per_chunk: 100}"]
    published = run_local(job_of(manifest, f"spec.output.uri={tmp_path}", *store))
    found = evaluated(published.uri)
    assert found == published.document.qualities
    assert list(found) == ["baseline", "quantized", "compensated", "compensated_prefill"]
    assert len({quality.perplexity for quality in found.values()}) == 4


def test_another_model_is_refused(uri: str, manifest: Path, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "other", torch.bfloat16, num_hidden_layers=2, seed=1)
    with pytest.raises(RequestError, match="the model that tiny was made from"):
        evaluated(uri, against=(tmp_path / "other").as_uri())
    shutil.copytree(manifest.parent / "model", tmp_path / "moved")
    assert evaluated(uri, against=(tmp_path / "moved").as_uri(), windows=1)["baseline"].kl == 0.0


def test_other_windows_lengths_and_texts_give_other_figures(uri: str, tmp_path: Path) -> None:
    usual = evaluated(uri)["compensated"]
    assert evaluated(uri, windows=3)["compensated"] != usual
    assert evaluated(uri, windows=3, sequence_length=16)["compensated"] != usual
    text = write_text(tmp_path / "text.txt", 100, seed=5).as_uri()
    assert evaluated(uri, text=text)["compensated"] != usual
    # All of a text that is given, not as many windows as the report had.
    assert evaluated(uri, text=text) == evaluated(uri, text=text, windows=3)


def test_more_windows_than_the_text_has(uri: str) -> None:
    with pytest.raises(RequestError, match=r"^--text: 224 tokens make 7 windows of 32: expected at least 8"):
        evaluated(uri, windows=8)


def test_an_artifact_without_validation_needs_a_text(manifest: Path, tmp_path: Path) -> None:
    unjudged = run_local(job_of(manifest, "spec.validation=", f"spec.output.uri={tmp_path}")).uri
    with pytest.raises(RequestError, match=r"^--text: the artifact was published without validation"):
        evaluated(unjudged)
    found = evaluated(unjudged, text=(manifest.parent / "validation.txt").as_uri())
    assert found["compensated"].perplexity > 1


def test_a_device_that_is_none(uri: str) -> None:
    with pytest.raises(RequestError, match=r"^--device: 'tpu': expected cpu or cuda"):
        evaluated(uri, device="tpu")


def test_what_was_damaged_is_not_measured(uri: str, tmp_path: Path) -> None:
    shutil.copytree(local_path(uri), tmp_path / "copy")
    report = tmp_path / "copy" / "report" / "report.json"
    report.write_text(report.read_text().replace('"tiny"', '"tonY"'))
    with pytest.raises(Exception, match=r"report\.json") as caught:
        evaluated((tmp_path / "copy").as_uri())
    assert type(caught.value).__name__ == "IntegrityError"
