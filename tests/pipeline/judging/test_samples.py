"""What models write after the same prompts: token by token what `load_model` and transformers write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from counterweight import load_model
from counterweight.pipeline.artifact.report import Report
from counterweight.pipeline.judging.samples import common_length
from tests.pipeline.tiny import LocalPool, job_of, local_path, run_local, write_job

PROMPTS, LENGTH, NEW = 3, 8, 6


def test_common_is_counted_from_the_first_token() -> None:
    assert common_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_length([1, 2, 3], [2, 2, 3]) == 0
    assert common_length([1, 2], [1, 2]) == 2


@pytest.mark.parametrize("compensation", ["{kind: svd, rank: {count: 4}}", "{kind: none}"])
def test_samples_are_what_the_models_write(tmp_path: Path, compensation: str) -> None:
    manifest = write_job(tmp_path / "job", layers=1)
    coarse = (
        "spec.recipe.weights={bits: 2, group_size: null, quantizer: {kind: rtn}}",
        f"spec.recipe.compensation={compensation}",
    )
    asked = f"spec.validation.generation={{prompts: {PROMPTS}, prompt_tokens: {LENGTH}, new_tokens: {NEW}}}"
    bound = "spec.validation.bounds=[{metric: longest_common, variant: quantized, at_least: 0}]"
    published = run_local(job_of(manifest, asked, bound, *coarse))
    artifact = local_path(published.uri)
    report = Report.model_validate_json((artifact / "report" / "report.json").read_bytes())
    assert report.generation is not None
    words = (manifest.parent / "validation.txt").read_text().split()
    prompts = [words[index * 32 : index * 32 + LENGTH] for index in range(PROMPTS)]
    assert [sample.prompt.split() for sample in report.generation.samples] == prompts
    models = {
        "baseline": AutoModelForCausalLM.from_pretrained(manifest.parent / "model", dtype=torch.float32),
        "quantized": load_model(published.uri, dtype=torch.float32, compensated=False),
        "compensated": load_model(published.uri, dtype=torch.float32),
    }
    written = {name: [greedy(model, prompt) for prompt in prompts] for name, model in models.items()}
    for index, sample in enumerate(report.generation.samples):
        assert {name: text.split() for name, text in sample.texts.items()} == {
            name: texts[index] for name, texts in written.items()
        }
        assert sample.common == {
            name: common_length(written["baseline"][index], texts[index]) for name, texts in written.items()
        }
    assert report.generation.longest_common["baseline"] == NEW
    assert report.generation.longest_common["quantized"] < NEW
    assert [gate.measured for gate in report.gates] == [report.generation.longest_common["quantized"]]
    page = (artifact / "report" / "report.html").read_text()
    assert " ".join(written["quantized"][0]) in page


def greedy(model: torch.nn.Module, prompt: list[str]) -> list[str]:
    """One forward pass of the whole text for each token, without a cache."""
    ids = [int(word[1:]) for word in prompt]
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return [f"w{token}" for token in ids[len(prompt) :]]


def test_nothing_is_written_where_nothing_was_asked_for(tmp_path: Path) -> None:
    pool = LocalPool(1)
    published = run_local(job_of(write_job(tmp_path / "job", layers=1)), pool)
    report = Report.model_validate_json((local_path(published.uri) / "report" / "report.json").read_bytes())
    assert report.generation is None
    assert "whole models" not in report.stages
    assert not any(task.kind == "generate" for _, task in pool.calls)
