"""A whole artifact on kernels: the logits and the text of the torch layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight.kernels.gpu.linear import KernelLinear
from counterweight.kernels.gpu.mixture import KernelExperts

# Kernels run on machines where jobs do not: the rest of this folder needs torch and triton alone.
for needed in ("pydantic", "boto3", "ray", "datasets", "transformers"):
    pytest.importorskip(needed)

from counterweight import load_model  # noqa: E402
from tests.pipeline.tiny import job_of, run_local, write_job  # noqa: E402

RECIPES: dict[str, tuple[str, Any, list[str]]] = {
    "W4A8, rotated, with a branch": (
        "llama",
        KernelLinear,
        [
            "spec.recipe.transforms=[{kind: rotation}]",
            "spec.recipe.activations={bits: 8}",
            "spec.recipe.compensation={kind: lrc, rank: {count: 4}}",
        ],
    ),
    "W3 with residuals": (
        "qwen2",
        KernelLinear,
        [
            "spec.recipe.weights.bits=3",
            "spec.recipe.weights.group_size=null",
            "spec.recipe.residual={channels_per_chunk: 100, selection: static}",
        ],
    ),
    "experts": (
        "mixtral",
        KernelExperts,
        ["spec.recipe.weights.group_size=null", "spec.recipe.compensation={kind: svd, rank: {count: 4}}"],
    ),
    "experts with biases": (
        "gpt_oss",
        KernelExperts,
        ["spec.recipe.weights.group_size=null", "spec.recipe.compensation={kind: svd, rank: {count: 4}}"],
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_an_artifact_on_kernels_is_the_artifact(name: str, tmp_path: Path, device: torch.device) -> None:
    family, kind, overrides = RECIPES[name]
    published = run_local(job_of(write_job(tmp_path, case=family, layers=1), *overrides))
    torch_model = load_model(published.uri, device=str(device), dtype=torch.float32, kernels="torch")
    model = load_model(published.uri, device=str(device), dtype=torch.float32, kernels="triton")
    assert any(isinstance(module, kind) for module in model.modules())
    ids = torch.randint(3, model.config.vocab_size, (1, 6), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        expected, found = torch_model(ids).logits, model(ids).logits
        # Of 8-bit inputs, a code on the border between two may fall the other way.
        assert (found - expected).abs().max() < (0.02 if "A8" in name else 1e-4) * expected.abs().max()
        tokens = [one.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0) for one in (torch_model, model)]
    assert torch.equal(*tokens)
