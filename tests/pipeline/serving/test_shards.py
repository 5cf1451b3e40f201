"""A layer on tensor-parallel ranks is the layer: outputs side by side, or added."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from counterweight.kernels.forms import ActivationFormat
from counterweight.pipeline.serving.served import served
from counterweight.pipeline.serving.shards import gathers, rank_columns, rank_rows, rank_slice
from tests.pipeline.serving.layers import IN, LAYERS, OUT, expected, random, store


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_ranks_of_a_column_parallel_layer_have_its_outputs_side_by_side(name: str, ranks: int) -> None:
    layer, x = LAYERS[name], random(9, IN, seed=9)
    parts = [served(rank_rows(layer, rank_slice(OUT, ranks, rank)))(x) for rank in range(ranks)]
    y = torch.cat(parts, dim=1)
    assert {part.shape[1] for part in parts} == {OUT // ranks}
    torch.testing.assert_close(y.double(), expected(layer, x), rtol=0, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_of_ranks_of_a_row_parallel_layer_add_up_to_its_own(name: str, ranks: int) -> None:
    layer, x = LAYERS[name], random(9, IN, seed=9)
    parts = []
    for rank in range(ranks):
        columns = rank_slice(IN, ranks, rank)
        whole = gathers(layer, IN // ranks)
        part = served(rank_columns(layer, columns), own=columns if whole else None)
        parts.append(part(x if whole else x[:, columns]))
    y = torch.stack(parts).sum(0)
    torch.testing.assert_close(y.double(), expected(layer, x), rtol=0, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize(
    ("name", "width", "found"),
    [
        ("3 bits, a branch", 64, False),
        ("inputs of 4 bits", 64, True),
        ("inputs in groups", 64, False),
        ("inputs in groups", 48, True),
        ("a Hadamard transform", 64, True),
    ],
)
def test_what_looks_at_a_whole_token_gathers_it(name: str, width: int, found: bool) -> None:
    assert gathers(LAYERS[name], width) == found


def test_a_rank_s_own_step_is_not_the_token_s() -> None:
    """What gathering is for: without it, each rank would quantize by the largest of its own channels."""
    layer, x = LAYERS["inputs of 4 bits"], random(9, IN, seed=9)
    parts = [served(rank_columns(layer, rank_slice(IN, 2, rank))) for rank in range(2)]
    y = sum(part(x[:, rank_slice(IN, 2, rank)]) for rank, part in enumerate(parts))
    assert isinstance(y, torch.Tensor)
    assert (y - expected(layer, x)).norm() > 1e-2 * y.norm()


def test_what_cannot_be_cut_is_refused() -> None:
    layer = LAYERS["weight alone"]
    with pytest.raises(ValueError, match=r"^columns: 16 to 32: expected a whole number of groups of 32"):
        rank_columns(layer, rank_slice(IN, 8, 1))
    with pytest.raises(ValueError, match=r"^48 channels over 5 tensor-parallel ranks"):
        rank_slice(OUT, 5, 0)
    with_store = replace(layer, residual=store(), activations=ActivationFormat(bits=8))
    for cut in (rank_rows, rank_columns):
        with pytest.raises(ValueError, match=r"^residual store: expected one rank"):
            cut(with_store, slice(0, 32))
