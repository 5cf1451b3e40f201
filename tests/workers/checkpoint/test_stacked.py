"""Tensors that are read apart on their first axis are those of the whole, with its digest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterweight.workers.checkpoint import Checkpoint, TensorEntry, tensor_digest
from counterweight.workers.checkpoint.buffers import stored_dtype
from counterweight.workers.checkpoint.digest import stacked_digest
from counterweight.workers.checkpoint.dtypes import F32
from counterweight.workers.checkpoint.stacked import apart
from tests.workers.checkpoint.builders import FLOATS, random_tensor, write_checkpoint


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 2), (4,), (0, 3), (2, 0)])
def test_the_parts_are_the_whole(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    whole = random_tensor(dtype, shape)
    stored = Checkpoint.open(write_checkpoint(tmp_path, {"model.safetensors": {"a": torch.ones(3), "x": whole}}))
    parts = stored.read_apart(["x"], sha256={"x": stored.digest("x")})["x"]
    assert len(parts) == shape[0]
    assert all(torch.equal(part, own) for part, own in zip(parts, whole, strict=True))
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
    assert stacked_digest(stored_dtype(dtype, where="x"), shape, parts).sha256 == tensor_digest(whole)


def test_what_is_not_finite_is_seen_in_any_part() -> None:
    parts = [torch.ones(2), torch.tensor([1.0, torch.inf])]
    assert not stacked_digest(F32, (2, 2), parts).finite
    assert stacked_digest(F32, (2, 2), parts[:1] * 2).finite


def test_a_scalar_has_no_parts() -> None:
    entry = TensorEntry(name="x", dtype=F32, shape=(), file="f", start=0, length=4)
    with pytest.raises(ValueError, match="x: a scalar: expected a tensor with a first axis"):
        apart(entry)
