"""Checkpoints that other tools wrote (`benchmarks/exports.py --fixtures`), with the logits that those have of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from counterweight.pipeline.judging.foreign import Foreign

EXPORTS = Path(__file__).parent / "exports"


def expected(name: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Ids [1, 12], logits [1, 12, vocabulary], and the dtype that the tool computed them in."""
    with safe_open(EXPORTS / name / "expected.safetensors", "pt") as file:
        return file.get_tensor("input_ids"), file.get_tensor("logits"), file.metadata()["dtype"]


@pytest.mark.parametrize("name", sorted(path.name for path in EXPORTS.iterdir()))
def test_it_has_the_logits_that_its_own_tool_has(name: str) -> None:
    ids, logits, dtype = expected(name)
    model = Foreign.open((EXPORTS / name).as_uri()).load(torch.float32).eval()
    with torch.no_grad():
        found = model(ids).logits
    # What a tool computes in half precision is that far from the same weights in single.
    tolerance = 1e-5 if dtype == "torch.float32" else 1e-2
    torch.testing.assert_close(found, logits, rtol=0, atol=tolerance * float(logits.abs().max()))
