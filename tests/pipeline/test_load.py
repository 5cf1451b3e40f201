"""`counterweight.load_model`: what its arguments do, and what it refuses. Its figures: `test_recomputed.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import counterweight
from counterweight.kernels.backend import Kernels
from counterweight.kernels.gpu.linear import KernelLinear
from counterweight.kernels.linear import CompensatedLinear
from counterweight.pipeline.artifact import load
from tests.pipeline.tiny import job_of, run_local, write_job

STORE = ("spec.recipe.weights.bits=3", "spec.recipe.residual={channels_per_chunk: 100}")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An artifact with branches and residual stores."""
    job = write_job(tmp_path_factory.mktemp("job"), case="mixtral", layers=1)
    return run_local(job_of(job, "spec.validation=", *STORE)).uri


def test_there_is_one_function() -> None:
    assert counterweight.load_model is load.load_model
    assert not hasattr(counterweight, "unload_model")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"residual": "prefill"}, "residual: 'prefill': expected decode or all"),
        ({"kernels": "cuda"}, "kernels: 'cuda': expected auto, torch or triton"),
    ],
)
def test_an_unknown_choice_is_refused(arguments: dict[str, Any], problem: str, uri: str) -> None:
    with pytest.raises(ValueError, match=problem):
        counterweight.load_model(uri, **arguments)


@pytest.mark.parametrize(("kernels", "layer"), [("torch", CompensatedLinear), ("triton", KernelLinear)])
def test_layers_run_on_the_kernels_that_are_asked_for(kernels: Kernels, layer: type[nn.Module], uri: str) -> None:
    """Loaded alone, where there is no GPU: Triton's interpreter takes its time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = counterweight.load_model(uri, device=device, kernels=kernels)
    found = {type(module) for module in model.modules()} & {CompensatedLinear, KernelLinear}
    assert found == {layer}


@torch.no_grad()
def test_a_prompt_is_left_alone_even_where_one_token_reaches_an_expert(uri: str) -> None:
    """Three tokens, two experts each: some of the four experts see a single one, as they do while decoding."""
    ids = torch.tensor([[5, 9, 17]])
    model = counterweight.load_model(uri, dtype=torch.float32)
    prefill, corrected = (
        model(ids).logits,
        counterweight.load_model(uri, dtype=torch.float32, residual="all")(ids).logits,
    )
    for module in model.modules():
        if isinstance(module, CompensatedLinear):
            module.residual = None
    assert torch.equal(prefill, model(ids).logits)
    assert not torch.equal(prefill, corrected)
