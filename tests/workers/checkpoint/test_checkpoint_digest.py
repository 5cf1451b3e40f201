"""Digests and finiteness, against hashlib and torch.isfinite."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from counterweight.workers.checkpoint import TensorDigest, tensor_digest
from counterweight.workers.checkpoint.buffers import flat_bytes, stored_dtype
from counterweight.workers.checkpoint.inspector import Inspector
from counterweight.workers.errors import CheckpointError
from tests.workers.checkpoint.builders import FLOATS, bits, every_dtype


def inspected(tensor: torch.Tensor, piece: int = 1 << 30) -> TensorDigest:
    inspector = Inspector(stored_dtype(tensor.dtype, where="a tensor"), tensor.shape)
    flat = flat_bytes(tensor)
    for begin in range(0, flat.size, piece):
        inspector.update(flat[begin : begin + piece])
    return inspector.result()


def test_the_digest_is_what_its_module_says() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    assert tensor_digest(tensor) == hashlib.sha256(b"BF16[2,3]\n" + bits(tensor)).hexdigest()
    scalar = torch.tensor(7)
    assert tensor_digest(scalar) == hashlib.sha256(b"I64[]\n" + bits(scalar)).hexdigest()


def test_dtype_shape_and_bytes_all_take_part() -> None:
    tensor = torch.zeros(2, 3)
    others = [tensor.int(), tensor.reshape(3, 2), tensor.reshape(6), -tensor, tensor[:1], tensor.half()]
    assert len({tensor_digest(each) for each in [tensor, *others]}) == 7


def test_a_view_has_the_digest_of_what_it_shows() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert tensor_digest(tensor.T) == tensor_digest(tensor.T.contiguous())
    assert tensor_digest(tensor[:, 1]) == tensor_digest(torch.tensor([1.0, 5.0, 9.0]))


@pytest.mark.parametrize("piece", [8, 16, 1 << 20])
def test_pieces_do_not_matter(piece: int) -> None:
    tensor = torch.randn(1000)
    tensor[-1] = torch.nan
    assert inspected(tensor, piece) == inspected(tensor)
    assert not inspected(tensor, piece).finite


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 131_072, 299_999])  # first, inside, last: beyond one block of the scan
def test_one_bad_element_is_found_anywhere(dtype: torch.dtype, bad: float, position: int) -> None:
    tensor = torch.ones(300_000, dtype=dtype)
    assert inspected(tensor).finite
    tensor[position] = bad
    assert not inspected(tensor).finite


def test_every_half_precision_pattern_is_judged_as_torch_judges_it() -> None:
    patterns = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16))
    for dtype in (torch.bfloat16, torch.float16):
        values = patterns.view(dtype)
        judged = torch.tensor([inspected(value).finite for value in values])
        assert torch.equal(judged, torch.isfinite(values))


def test_extremes_are_finite() -> None:
    for dtype in FLOATS:
        limits = torch.finfo(dtype)
        tensor = torch.tensor([limits.max, limits.min, limits.tiny, -0.0, limits.smallest_normal / 2], dtype=dtype)
        assert inspected(tensor).finite


def test_integers_are_finite_whatever_their_bits() -> None:
    for word, tensor in every_dtype().items():
        if not tensor.dtype.is_floating_point and tensor.dtype != torch.bool:
            assert inspected(torch.full_like(tensor, -1 if tensor.dtype.is_signed else 255)).finite, word


def test_an_empty_tensor_has_a_digest() -> None:
    empty = torch.empty(0, 4, dtype=torch.float16)
    assert inspected(empty) == TensorDigest(sha256=hashlib.sha256(b"F16[0,4]\n").hexdigest(), finite=True)


def test_a_dtype_without_a_word_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"complex64, expected one of I64, F64"):
        tensor_digest(torch.zeros(2, dtype=torch.complex64))
